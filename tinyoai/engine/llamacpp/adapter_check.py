"""The checks of a LoRA adapter before llama.cpp reads it: what its loader asserts on, trusts, or ignores.

llama.cpp looks at two of a matrix's sides when it loads an adapter. Over the others it ends its process in the first
step, and matrices that it does not know in its graph change nothing without a word.
"""

from tinyoai import gguf
from tinyoai.engine.llamacpp.architectures import reads_whole_texts
from tinyoai.engine.llamacpp.header_check import MAX_ALIGNMENT, MAX_NAME, MIN_ALIGNMENT

MAX_TENSORS = 1 << 16
MAX_RANK = 1 << 16
MAX_ALPHA = 1e6
A, B = ".lora_a", ".lora_b"
"""Ends of the names of an adapter's tensors: B times A is what is added to the matrix before the end."""
_ALPHA = "adapter.lora.alpha"
_TYPES = frozenset({"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"})
_EMBEDDING = "token_embd.weight"
_UNSCALED = "NVFP4"
"""The type of matrices whose products llama.cpp scales afterwards, so that nothing can be added to them."""


class AdapterError(Exception):
    """llama.cpp cannot apply the adapter to the model; the words follow the file's name."""


def check_adapter(adapter: gguf.Header, model: gguf.Header) -> None:
    """Raises AdapterError if llama.cpp would refuse the adapter, crash over it, or apply only a part of it."""
    if adapter.role != "adapter" or adapter.metadata.get("adapter.type") != "lora":
        raise AdapterError("is not a LoRA adapter; name a file that convert_lora_to_gguf.py has written")
    if reads_whole_texts(model):
        raise AdapterError(f"cannot be used with a {model.architecture[:40]} model, which generates no text")
    if adapter.architecture != model.architecture:
        raise AdapterError(
            f"is for {adapter.architecture[:40] or 'unnamed'} models and this is a {model.architecture} model; "
            "choose an adapter that was made for this model"
        )
    if "adapter.alora.invocation_tokens" in adapter.metadata:
        raise AdapterError(
            "is an activated LoRA, which this server does not support; choose a plain LoRA adapter"
        )
    _check_numbers(adapter)
    pairs = {name.removesuffix(A) for name in adapter.tensors if name.endswith(A)}
    pairs |= {name.removesuffix(B) for name in adapter.tensors if name.endswith(B)}
    for name in adapter.tensors:
        if not name.endswith((A, B)):
            raise AdapterError(
                f"has the tensor {name[:MAX_NAME]!r}, which is no part of a LoRA pair; convert it again without it"
            )
    for name in sorted(pairs):
        _check_pair(adapter, model, name)


def _check_numbers(adapter: gguf.Header) -> None:
    alpha = adapter.metadata.get(_ALPHA, 0.0)
    # a number of another type ends llama.cpp's process
    if type(alpha) is not float or _ALPHA in adapter.doubles or not abs(alpha) <= MAX_ALPHA:
        raise AdapterError(f"has no usable {_ALPHA} in its header; convert the adapter again")
    if not MIN_ALIGNMENT <= adapter.alignment <= MAX_ALIGNMENT:
        raise AdapterError(f"aligns its tensors to {adapter.alignment} bytes; convert the adapter again")
    if not 0 < len(adapter.tensors) <= MAX_TENSORS:
        raise AdapterError(f"has {len(adapter.tensors)} tensors; convert the adapter again")
    if adapter.n_files != 1:
        raise AdapterError("is one of several files; join them to one")
    for tensor in adapter.tensors.values():
        if tensor.type_name not in _TYPES:
            raise AdapterError(
                f"holds the tensor {tensor.name[:MAX_NAME]} in the type {tensor.type_name}; convert the adapter to F16"
            )
        if len(tensor.name.encode()) > MAX_NAME or not tensor.size:
            raise AdapterError(
                f"has an empty tensor or one with a long name, {tensor.name[:MAX_NAME]!r}; convert the adapter again"
            )


def _check_pair(adapter: gguf.Header, model: gguf.Header, name: str) -> None:
    a, b, base = adapter.tensors.get(name + A), adapter.tensors.get(name + B), model.tensors.get(name)
    shown = name[:MAX_NAME]
    if a is None or b is None:
        raise AdapterError(
            f"has only one of the two matrices of {shown!r}; copy or convert the adapter again"
        )
    if base is None or A in name or B in name:
        raise AdapterError(
            f"changes {shown!r}, which this model does not have; choose an adapter that was made for this model"
        )
    if len(base.shape) not in (2, 3) or not name.endswith(".weight") or base.type_name == _UNSCALED:
        raise AdapterError(
            f"changes {shown!r}, which llama.cpp cannot change by an adapter; convert the adapter without it"
        )
    if name == _EMBEDDING and "output.weight" not in model.tensors:
        # llama.cpp would use the pair of the first matrix for the last one too, where its sides do not fit
        raise AdapterError(
            f"changes {shown!r}, which is this model's last matrix too, and llama.cpp would end over that; train the "
            "adapter without the embedding matrix"
        )
    (a_in, a_out, *a_more), (b_in, b_out, *b_more) = _sides(a), _sides(b)
    n_in, n_out, *more = _sides(base)
    if name.endswith(_EMBEDDING):  # rows of A are looked up by token
        fits = (a_out, b_out) == (n_out, n_in) and a_in == b_in
        rank = a_in
    else:
        fits = (a_in, b_out) == (n_in, n_out) and a_out == b_in
        rank = b_in
    if not fits or a_more != more or b_more != more or not 1 <= rank <= MAX_RANK:
        raise AdapterError(
            f"has matrices of {shown!r} that do not fit the model's; choose an adapter that was made for this model"
        )


def _sides(tensor: gguf.Tensor) -> list[int]:
    """All four sides of a tensor; a side that the file leaves out is 1."""
    return [*tensor.shape, *(1,) * (4 - len(tensor.shape))]
