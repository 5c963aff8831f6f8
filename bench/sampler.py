"""Measures the time to choose one token, compared with ctransformers, llama.cpp and a full sort in numpy.

The logits are random and normal, with temperature 0.8, top_p 0.95, repeat_penalty 1.1 over 64 tokens, four entries
of logit_bias (ours only), and with and without top_k 40. The figures are medians over the runs, in microseconds and
as multiples of ours. Goal at 32,000 entries: 30 µs with top_k, 90 µs without. llama-cpp-python is measured if it is
installed; its time includes filling its candidate array.
"""

import argparse
import ctypes
import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from table import median, show

from tinyoai.native import Sampler
from tinyoai.sampling import Sampling

Logits = NDArray[np.float32]
Draw = Callable[[], object]

TEMPERATURE, TOP_P, REPEAT_PENALTY, LAST_N = 0.8, 0.95, 1.1, 64


def ours(x: Logits, top_k: int, history: list[int]) -> Draw:
    """Returns one C call on a pointer, as the worker makes it."""
    from cffi import FFI

    params = Sampling(
        temperature=TEMPERATURE,
        top_k=top_k,
        top_p=TOP_P,
        repeat_penalty=REPEAT_PENALTY,
        repeat_last_n=LAST_N,
        logit_bias={1: -100.0, 2: 1.5, len(x) // 2: -1.0, len(x) - 1: 3.0},
        seed=1,
    )
    sampler = Sampler(len(x), params, n_ctx=4096)
    sampler.accept_prompt(history)
    pointer = FFI().cast("float *", x.ctypes.data)
    return lambda: sampler.sample(pointer)


def full_sort(x: Logits, top_k: int, history: list[int]) -> Draw:
    """Returns the plain method: penalties on a copy, a full sort and a cumulative sum."""
    random = np.random.default_rng(1)
    recent = np.array(sorted(set(history)))

    def draw() -> int:
        z = x.copy()
        z[recent] = np.where(z[recent] > 0, z[recent] / REPEAT_PENALTY, z[recent] * REPEAT_PENALTY)
        order = np.argsort(-z)[: top_k or None]
        p = np.exp((z[order] - z[order[0]]) / TEMPERATURE)
        mass = np.cumsum(p)
        n = 1 + int(np.searchsorted(mass, TOP_P * mass[-1]))
        return int(order[np.searchsorted(mass[:n], random.random() * mass[n - 1])])

    return draw


def write_model(path: Path, n_vocab: int) -> None:
    """Writes the smallest llama that ctransformers loads; only the size of its vocabulary matters."""
    import gguf

    width, n_feed_forward = 32, 32
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(n_feed_forward)
    writer.add_head_count(1)
    writer.add_rope_dimension_count(width)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 3, 3, *[6] * 256]
    n_rest = n_vocab - len(tokens)
    writer.add_token_list([*tokens, *(f"t{i}" for i in range(n_rest))])
    writer.add_token_scores([0.0] * n_vocab)
    writer.add_token_types([*types, *[1] * n_rest])
    shapes = {
        "token_embd": (n_vocab, width),
        "output_norm": (width,),
        "output": (n_vocab, width),
        "blk.0.attn_norm": (width,),
        "blk.0.ffn_norm": (width,),
        "blk.0.ffn_gate": (n_feed_forward, width),
        "blk.0.ffn_up": (n_feed_forward, width),
        "blk.0.ffn_down": (width, n_feed_forward),
        **{f"blk.0.attn_{part}": (width, width) for part in ("q", "k", "v", "output")},
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def ctransformers(x: Logits, top_k: int, history: list[int]) -> Draw:
    """Returns the library's C function on a copy of the logits. Without top_k, all tokens count as top_k."""
    from ctransformers import LLM, Config

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_model(path, len(x))
        llm = LLM(str(path), model_type="llama", config=Config(context_length=128, threads=1))
        llm.eval([1])
    ctypes.memmove(llm.ctransformers_llm_logits_data(), x.ctypes.data, x.nbytes)
    last = (ctypes.c_int * LAST_N)(*history[-LAST_N:])
    k = top_k or len(x)
    return lambda: llm.ctransformers_llm_sample(last, LAST_N, k, TOP_P, TEMPERATURE, REPEAT_PENALTY, 1)


def llama_cpp(x: Logits, top_k: int, history: list[int]) -> Draw:
    """Returns llama.cpp's chain of samplers on a candidate array, which is refilled for each token."""
    import llama_cpp as lib

    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    for part in (
        lib.llama_sampler_init_penalties(len(x), LAST_N, REPEAT_PENALTY, 0.0, 0.0),
        lib.llama_sampler_init_temp(TEMPERATURE),
        lib.llama_sampler_init_top_k(top_k),
        lib.llama_sampler_init_top_p(TOP_P, 1),
        lib.llama_sampler_init_dist(1),
    ):
        lib.llama_sampler_chain_add(chain, part)
    for token in history:
        lib.llama_sampler_accept(chain, token)
    layout = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
    data, ids = np.zeros(len(x), layout), np.arange(len(x), dtype=np.int32)

    def draw() -> int:
        data["id"], data["logit"] = ids, x
        pointer = data.ctypes.data_as(ctypes.POINTER(lib.llama_token_data))
        array = lib.llama_token_data_array(data=pointer, size=len(x), selected=-1, sorted=False)
        lib.llama_sampler_apply(chain, ctypes.byref(array))
        token = int(array.data[array.selected].id)
        lib.llama_sampler_accept(chain, token)
        return token

    return draw


def microseconds(draw: Draw, budget: float) -> float:
    """Returns the mean time of a draw, over as many as fit into `budget` seconds, but at least three."""
    n, started = 0, time.perf_counter()
    while n < 3 or time.perf_counter() - started < budget:
        draw()
        n += 1
    return (time.perf_counter() - started) / n * 1e6


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[4_000, 32_000, 128_000, 262_144])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--budget", type=float, default=0.02, help="seconds for each sampler in each run")
    args = parser.parse_args()
    makers = {"tinyoai": ours, "numpy, full sort": full_sort, "ctransformers": ctransformers}
    if importlib.util.find_spec("llama_cpp"):
        makers["llama.cpp"] = llama_cpp
    rows = []
    for n_vocab in args.vocabularies:
        random = np.random.default_rng(n_vocab)
        x = random.normal(size=n_vocab).astype(np.float32)
        history = random.integers(3, n_vocab, 200).tolist()
        for top_k in (40, 0):
            draws = {name: make(x, top_k, history) for name, make in makers.items()}
            runs = [
                {name: microseconds(draw, args.budget) for name, draw in draws.items()}
                for _ in range(args.runs)
            ]
            for name in makers:
                rows.append(
                    [
                        f"{n_vocab:,}",
                        str(top_k or "off"),
                        name,
                        f"{median([run[name] for run in runs]):,.1f}",
                        f"{median([run[name] / run['tinyoai'] for run in runs]):.1f}",
                    ]
                )
    head = ["vocabulary", "top_k", "sampler", "µs", "ratio"]
    show(f"sampling one token, median of {args.runs} runs", head, rows)


if __name__ == "__main__":
    main()
