"""Writes the network as a GGUF file (Q8_0 matrices, F32 norms), and reads it back."""

import os
from pathlib import Path

import gguf
import numpy as np
import torch

from training.model import Llama
from training.tokenizer import BOS, IM_END, UNK, Tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>'"
    " + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def export(model: Llama, tokenizer: Tokenizer, path: Path) -> None:
    """Writes the file under a temporary name, then renames it."""
    config = model.config
    temporary = path.with_suffix(path.suffix + ".tmp")
    writer = gguf.GGUFWriter(str(temporary), "llama")
    writer.add_name("tinyoai-chat")
    writer.add_description("A tiny demonstration chat model, trained from nothing")
    writer.add_license("MIT")
    writer.add_context_length(config.n_ctx)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(model.n_ff)
    writer.add_rope_dimension_count(config.n_embd // config.n_head)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_head_kv)
    writer.add_layer_norm_rms_eps(config.epsilon)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    tokens, scores, types = tokenizer.table()
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(IM_END)
    writer.add_unk_token_id(UNK)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, tensor in model.state_dict().items():
        data = tensor.float().numpy().astype(np.float32)
        name = name.replace("blocks.", "blk.")
        if data.ndim == 1:
            writer.add_tensor(name, data)
        else:
            quantized = gguf.quants.quantize(data, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def load(model: Llama, path: Path) -> None:
    """Copies the dequantized weights of a file into a network."""
    state = {}
    for tensor in gguf.GGUFReader(str(path)).tensors:
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        state[tensor.name.replace("blk.", "blocks.")] = torch.from_numpy(np.array(data, np.float32))
    model.load_state_dict(state)
