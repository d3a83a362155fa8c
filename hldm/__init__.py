"""hldm: a latent-diffusion hierarchical language model.

A character-level Griffin autoencoder compresses text into one latent per variable-length chunk, a
transformer diffusion prior denoises the next chunk's latent, a small decoder writes it out. The words are
defined in docs/glossary.md.

Shapes, everywhere in docstrings, comments, einops strings and messages:

    b documents (rows)   t bytes of a document        n chunks of a document    l bytes of one chunk, padded
    c context entries    d model width                z latent width            h heads
    v vocabulary         m noise draws of a latent    t' decoder events (bytes and ends)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hldm.config import Config as Config
    from hldm.config import load_config as load_config
    from hldm.evaluation.evaluate import evaluate_run as evaluate  # noqa: F401
    from hldm.generation.pipeline import HLDMPipeline as HLDMPipeline
    from hldm.generation.pipeline import HLDMPipelineOutput as HLDMPipelineOutput
    from hldm.model.autoencoder import Autoencoder as Autoencoder
    from hldm.model.griffin import Griffin as Griffin
    from hldm.model.ops import linear_scan as linear_scan
    from hldm.model.prior import Prior as Prior
    from hldm.training.stages import train_autoencoder as train_autoencoder
    from hldm.training.stages import train_diffusion as train_diffusion

__version__ = "0.1.0"

# Where each public name lives, and its name there if another; imported on first use (PEP 562), so that `import hldm`
# needs no torch.
_HOMES = {
    "Autoencoder": "model.autoencoder",
    "Config": "config",
    "Griffin": "model.griffin",
    "HLDMPipeline": "generation.pipeline",
    "HLDMPipelineOutput": "generation.pipeline",
    "Prior": "model.prior",
    "evaluate": "evaluation.evaluate:evaluate_run",
    "linear_scan": "model.ops",
    "load_config": "config",
    "train_autoencoder": "training.stages",
    "train_diffusion": "training.stages",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hldm' has no attribute {name!r}")
    home, _, own_name = _HOMES[name].partition(":")
    return getattr(import_module(f"hldm.{home}"), own_name or name)
