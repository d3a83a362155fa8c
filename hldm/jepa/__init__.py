"""The JEPA family: predict what hidden text means, in latent space, by one objective with switches."""
