"""Whether a model still holds the weights that it held."""

from __future__ import annotations

from torch import Tensor, nn


class Weights:
    """The parameters and buffers of a model, as they are now, to be compared with what they are later.

    Seen: another layer in the place of one (quantized, adapted), another device or dtype, and what is written into a
    tensor (a step of an optimizer, ``load_state_dict``). Not seen: a tensor put in the place of another of the same
    kind, as those do who rearrange weights without changing them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._then = {name: (t, _state(t)) for name, t in _tensors(model).items()}

    def changed(self, model: nn.Module) -> str | None:
        """The name of a tensor that is not what it was."""
        now = _tensors(model)
        if now.keys() != self._then.keys():
            return min(now.keys() ^ self._then.keys())
        for name, (tensor, state) in self._then.items():
            current = _state(now[name])
            if current[:2] != state[:2] or (now[name] is tensor and current != state):
                return name
        return None


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def _state(t: Tensor) -> tuple[object, ...]:
    """Dtype, device, place and how often it was written to, which tensors of inference mode do not count."""
    return t.dtype, t.device, t.data_ptr(), 0 if t.is_inference() else t._version
