"""The latent of a chunk just written and the trunk's step after it, in a single call of C++.

What `Autoencoder.close_chunk` does in torch, to rounding, where chunks are pooled by their mean. Like
`hldm.kernels.stack`, this reads the parameters where they are.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hldm.kernels.stack import stack_call
from hldm.kernels.structs import is_plain, run, struct
from hldm.model.autoencoder import Autoencoder
from hldm.model.state import EncoderState, GriffinState


def _parameters(autoencoder: Autoencoder) -> dict[str, Tensor]:
    """What the kernel reads of the readout, by the names in `Closing` of hldm/kernels/cpp/close.cpp."""
    normaliser = autoencoder.normaliser
    read: Any = autoencoder.to_latent  # Any: one of two readouts
    return {
        "inner": read.inner.weight,
        "inner_bias": read.inner.bias,
        "place": read.place.weight,
        "outer": read.outer.weight,
        "outer_bias": read.outer.bias,
        "mean": normaliser.mean,
        "deviation": normaliser.deviation,
    }


def close_chunk(
    autoencoder: Autoencoder,
    y: Tensor,
    griffin: GriffinState,
    length: Tensor,
    opens: Tensor,
    state: EncoderState,
) -> tuple[Tensor, EncoderState]:
    """`Autoencoder.close_chunk` of float32 features y (b l d); state: left as it is."""
    rows, bytes_, d = y.shape
    assert length.shape == (rows,) and opens.shape == (rows, 1) and is_plain(y)
    parameters = _parameters(autoencoder)
    feature, latents = y.new_empty(rows, d), y.new_empty(rows, autoencoder.latent_dim)
    known, trunk, step = feature, state.trunk, {}
    if autoencoder.settings.trunk_layers:
        to_trunk = autoencoder.to_trunk
        known = y.new_empty(rows, to_trunk.out_features)
        step["trunk"], trunk = stack_call(autoencoder.trunk, trunk, rows)
        step |= {"to_trunk": [to_trunk.weight, to_trunk.bias], "known": known}
    call = struct("close.cpp", "Closing")(
        rows=rows,
        bytes=bytes_,
        d=d,
        k=len(parameters["inner"]),
        z=autoencoder.latent_dim,
        features=y,
        length=length.contiguous(),
        opens=opens.contiguous(),
        feature=feature,
        latents=latents,
        **step,
        **parameters,
    )
    run("hldm_close", call)
    return latents[:, None], EncoderState(griffin, feature, trunk, known)
