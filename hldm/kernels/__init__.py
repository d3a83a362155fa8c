"""Speed, and nothing else: faster forms of what hldm.model and hldm.generation say plainly."""
