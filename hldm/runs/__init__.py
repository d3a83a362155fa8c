"""Run folders that survive kills, full disks and signals. Knows no model but how one is saved."""
