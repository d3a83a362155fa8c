"""The predictor: from the vectors of the chunks that can be seen to those of the hidden ones.

Griffin takes one step a chunk and predicts from what came before; the transformer sees both sides of a hole, within
the window and the document. Both know which chunks are hidden, and predict at every chunk.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from hldm.config import StackConfig, changed, section_from_dict, to_dict
from hldm.jepa.config import PredictorConfig
from hldm.model.griffin import Griffin
from hldm.model.readouts import LatentNormaliser
from hldm.runs.saved_model import SavedModel


class Predictor(SavedModel):
    """c (b n z) and what is hidden -> p (b n z)."""

    @register_to_config
    def __init__(self, predictor: dict, vector: int):
        super().__init__()
        self.settings = settings = section_from_dict(PredictorConfig, predictor)
        self.read = nn.Linear(vector, settings.width)
        self.hole = nn.Parameter(0.5 * torch.randn(settings.width))  # added at every hidden chunk
        self.stack: nn.Module
        if settings.kind == "griffin":
            griffin = changed(
                StackConfig(),
                width=settings.width,
                heads=settings.heads,
                blocks=("recurrent",) * settings.layers,
            )
            self.stack = Griffin(griffin, window=1)
        else:
            layer = nn.TransformerEncoderLayer(
                settings.width,
                settings.heads,
                dim_feedforward=2 * settings.width,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            norm = nn.LayerNorm(settings.width)
            self.stack = nn.TransformerEncoder(layer, settings.layers, norm, enable_nested_tensor=False)
        self.write = nn.Linear(settings.width, vector)
        self.scale = LatentNormaliser(
            vector
        )  # of the targets that it learns from, where they are standardised

    @classmethod
    def from_settings(cls, predictor: PredictorConfig, vector: int) -> Predictor:
        """Build from config sections."""
        return cls(to_dict(predictor), vector)

    def forward(self, vectors: Tensor, hidden: Tensor, opens: Tensor, count: Tensor) -> Tensor:
        """Predictions (b n z); only those at hidden chunks are asked for in training.

        vectors: (b n z);  hidden, opens: (b n) bool, what is to be predicted, the first chunk of a document
        count: (b) chunks of each row
        """
        x = self.read(vectors) + hidden[..., None] * self.hole
        if isinstance(self.stack, Griffin):
            state = self.stack.initial_state(len(x), x.device)
            y, _ = self.stack(x, state, opens, opens, count)
        else:
            x = x + sinusoids(x.shape[1], x.shape[2], x.device)
            y = self.stack(x, mask=self._apart(opens, count))
        return self.write(y)

    def at_encoder_scale(self, predicted: Tensor) -> Tensor:
        """Predictions (... z) of standardised targets as vectors of the target encoder."""
        return predicted * self.scale.deviation + self.scale.mean

    def _apart(self, opens: Tensor, count: Tensor) -> Tensor:
        """(bh n n) bool: which chunks must not see each other, for they are of two documents or padding."""
        n = opens.shape[1]
        place = torch.arange(n, device=opens.device)
        document = opens.cumsum(dim=1).masked_fill(place >= count[:, None], -1)  # padding sees padding
        apart = document[:, :, None] != document[:, None]
        return apart.repeat_interleave(self.settings.heads, dim=0)


def sinusoids(places: int, width: int, device: torch.device) -> Tensor:
    """Positions 0, 1, ... as sines and cosines (Vaswani et al. 2017, section 3.5). (n d)."""
    pairs = width // 2
    frequency = 1e4 ** (-torch.arange(pairs, device=device) / pairs)
    angle = torch.arange(places, device=device)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)
