"""Writes tiny random checkpoints and what the reference implementation computes of them.

    python make_fixtures.py FOLDER [FAMILY ...]

A folder a family: `model.safetensors` under published names, `config.json` as the reference saves
it, `config.published.json` as files published earlier spell it, `reference.npz` with inputs,
hidden states, routing, losses, gradients and greedy text. README.md has the versions.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from chosen import chosen_gradients, is_router
from families import FAMILIES
from recorder import Recorder, parts_of
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

BATCH, LENGTH, PADS = 2, 21, 5
PROMPT, PADDED_PROMPT, PROMPT_PADS = 9, 12, 7
NUM_NEW = 16
PAD = 0
MIN_GAP = 3e-4  # between the best two logits of a greedy step, in deviations of the logits
MIN_DISTINCT = 6  # tokens of a greedy row
NOISE = 2e-5  # relative; no decision may hang on it
EXECUTION = {"attn_implementation": "eager", "experts_implementation": "eager"}


def build(config):
    """Returns a model of random weights that runs step by step in float32."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **EXECUTION)
    return model.eval()


def random_value(name, tensor, generator, family, is_tied):
    """Returns a value for one parameter or buffer: of a size at which it shows in the outputs."""
    noise = torch.randn(tensor.shape, generator=generator)
    if name.endswith("e_score_correction_bias"):
        return family.bias_scale * noise
    if name.endswith("bias"):
        return 0.3 * noise
    if tensor.ndim == 1:  # the weight of a norm
        weight = 1 + 0.3 * noise
        is_final = name.endswith(("model.norm.weight", "norm_f.weight"))
        if is_tied and is_final:  # else the model only repeats its last token
            weight *= torch.sign(torch.randn(tensor.shape, generator=generator))
        return weight
    if "embed_tokens" in name or "wte" in name:
        return (0.5 if is_tied else 1.0) * noise
    gain = 2.0 if name.startswith("lm_head") else 1.4
    return gain * noise / tensor.shape[-1] ** 0.5


def fill(model, family, seed):
    """Sets every parameter and every saved buffer."""
    generator = torch.Generator().manual_seed(seed)
    is_tied = model.config.tie_word_embeddings
    saved = set(model.state_dict())
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name in sorted(tensors):
            if name in saved:
                value = random_value(name, tensors[name], generator, family, is_tied)
                tensors[name].copy_(value)


def save(model, folder):
    """Writes the weights under published names and the configuration."""
    model.generation_config = GenerationConfig()
    model.save_pretrained(folder)
    if model.config.model_type == "longcat_flash":
        tensors = longcat_layout(load_file(folder / "model.safetensors"), model.config)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def longcat_layout(tensors, config):
    """Returns the published tensors, which have no weights for the experts without weights."""
    kept = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        is_expert = "experts" in parts and parts[parts.index("experts") + 1].isdigit()
        if is_expert and int(parts[parts.index("experts") + 1]) >= config.n_routed_experts:
            continue
        kept[name] = tensor.contiguous()
    return kept


def reload(folder, model):
    """Returns the saved model; where the reference cannot read its layout, the one in memory."""
    if model.config.model_type == "longcat_flash":
        return model
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **EXECUTION)
    return loaded.eval()


def published(config, family):
    """Returns the configuration as files spelled it before version 5 of the reference."""
    rope = config.pop("rope_parameters")
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "published-style"
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    config["rope_scaling"] = (
        None if kind == "default" else {**rope, "type": kind, "rope_type": kind}
    )
    renamed = {family.rename.get(key, key): value for key, value in config.items()}
    for key in ("attn_config", "ffn_config"):
        if key in renamed:
            renamed[key] = family.own[key] | {"model_type": ""}
    kept = {key: value for key, value in renamed.items() if key not in family.drop}
    return kept | family.add


def inputs_of(seed, vocabulary):
    """Returns token ids, masks and labels."""
    random = np.random.default_rng(seed)

    def draw(length):
        return random.integers(3, vocabulary, (BATCH, length))

    tokens, left, right = draw(LENGTH), draw(LENGTH), draw(LENGTH)
    labels = tokens.copy()
    labels[0, :3] = -100
    left_mask, right_mask = np.ones_like(left), np.ones_like(right)
    left_mask[1, :PADS] = 0
    right_mask[1, -PADS:] = 0
    prompt, padded = tokens[:, :PROMPT], left[:, :PADDED_PROMPT]
    prompt_mask = np.ones_like(padded)
    prompt_mask[1, :PROMPT_PADS] = 0
    return {
        "input_ids": tokens,
        "labels": labels,
        "lpad.input_ids": np.where(left_mask, left, PAD),
        "lpad.attention_mask": left_mask,
        "lpad.position_ids": np.maximum(np.cumsum(left_mask, axis=1) - 1, 0),
        "rpad.input_ids": np.where(right_mask, right, PAD),
        "rpad.attention_mask": right_mask,
        "rpad.labels": np.where(right_mask, right, -100),
        "gen.prompt": prompt,
        "lpad.gen.prompt": np.where(prompt_mask, padded, PAD),
        "lpad.gen.attention_mask": prompt_mask,
    }


def forward(model, inputs, prefix=""):
    """Returns the model's output for the batch of a prefix."""
    names = ["input_ids", "attention_mask", "position_ids"]
    given = {name: inputs.get(f"{prefix}{name}") for name in names}
    tensors = {name: torch.tensor(value) for name, value in given.items() if value is not None}
    return model(**tensors, use_cache=False, **router_flag(model))


def router_flag(model):
    """Returns the argument that asks for router logits, where the family computes a loss."""
    has_loss = hasattr(model, "router_aux_loss_coef") or hasattr(model, "moe_loss_weight")
    return {"output_router_logits": True} if has_loss or coefficient(model.config) else {}


def coefficient(config):
    """Returns the weight of the auxiliary loss; 0 where there is none."""
    if config.model_type == "dbrx":
        return config.ffn_config.moe_loss_weight
    if config.model_type in {"llama4_text", "longcat_flash"}:
        return 0.0
    for name in ("router_aux_loss_coef", "aux_loss_coef"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return 0.0


def cross_entropy(logits, labels):
    """Returns the mean loss of the next token; labels of -100 count for nothing."""
    labels = torch.tensor(labels)
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def losses(model, inputs):
    """Returns what the batches give without gradients, by the names of reference.npz."""
    found = {}
    for prefix in ("", "lpad.", "rpad."):
        output = forward(model, inputs, prefix)
        found[f"{prefix}logits"] = output.logits
        aux = getattr(output, "aux_loss", None)
        if aux is not None:
            found[f"{prefix}aux_loss"] = aux
        if prefix == "lpad.":
            continue
        lm = cross_entropy(output.logits, inputs[f"{prefix}labels"])
        found[f"{prefix}loss_lm"] = lm
        if aux is not None:
            found[f"{prefix}loss_total"] = lm + coefficient(model.config) * aux
    return found


def greedy(model, inputs, prefix):
    """Returns tokens [B, L] and logits [N, B, V] of greedy decoding with a cache."""
    prompt = torch.tensor(inputs[f"{prefix}gen.prompt"])
    mask = inputs.get(f"{prefix}gen.attention_mask")
    mask = torch.ones_like(prompt) if mask is None else torch.tensor(mask)
    settings = GenerationConfig(
        max_new_tokens=NUM_NEW,
        do_sample=False,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_logits=True,
    )
    model.generation_config.eos_token_id = None
    output = model.generate(prompt, attention_mask=mask, generation_config=settings)
    return output.sequences, torch.stack(output.logits)


def gradients(model, inputs, name, config, folder):
    """Returns the gradients of one loss by published names: saved as weights are."""
    model.zero_grad()
    losses(model, inputs)[name].backward()
    twin = build(config)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for key, parameter in twin.named_parameters():
            gradient = own[key].grad
            parameter.copy_(torch.zeros_like(parameter) if gradient is None else gradient)
    save(twin, folder)
    saved = load_file(folder / "model.safetensors")
    return {key: value for key, value in saved.items() if "e_score_correction_bias" not in key}


def decisions(model, inputs):
    """Returns every choice that a little noise must not change, and the logits."""
    recorder = Recorder(model)
    found = losses(model, inputs)
    for prefix in ("", "lpad."):
        tokens, _ = greedy(model, inputs, prefix)
        found[f"{prefix}gen.tokens"] = tokens
    recorder.stop()
    chosen = {name: value for name, value in found.items() if name.endswith("tokens")}
    logits = {name: value for name, value in found.items() if name.endswith("logits")}
    return chosen, logits


def routes(model, inputs):
    """Returns the sets of experts of the three batches."""
    found = {}
    for prefix in ("", "lpad.", "rpad."):
        recorder = Recorder(model)
        forward(model, inputs, prefix)
        mask = torch.tensor(inputs.get(f"{prefix}attention_mask", np.ones((BATCH, LENGTH), int)))
        for name, value in recorder.stop().items():
            if name.endswith(".indices"):
                found[prefix + name] = value.sort(dim=-1).values[mask.flatten() == 1]
    return found


def is_stable(model, inputs):
    """Says whether routing and text stay as they are under noise on all weights."""
    chosen, logits = decisions(model, inputs)
    experts = routes(model, inputs)
    generator = torch.Generator().manual_seed(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stable = True
    with torch.no_grad():
        for _ in range(2):
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.mul_(1 + NOISE * noise)
            noisy, noisy_logits = decisions(model, inputs)
            noisy_experts = routes(model, inputs)
            stable &= all(torch.equal(chosen[name], noisy[name]) for name in chosen)
            stable &= all(torch.equal(experts[name], noisy_experts[name]) for name in experts)
            for name, value in logits.items():
                stable &= bool((value - noisy_logits[name]).abs().max() < 0.01 * value.std())
            model.load_state_dict(before)
    return stable


def is_decided(tokens, logits, length):
    """Says whether no greedy step is close and the text varies."""
    best = logits.topk(2, dim=-1).values
    gap = (best[..., 0] - best[..., 1]).min() / logits.std()
    num_distinct = min(len(set(row[length:].tolist())) for row in tokens)
    return bool(gap > MIN_GAP) and num_distinct >= MIN_DISTINCT


def bias_matters(model, inputs):
    """Says whether the selection biases change which experts are chosen."""
    buffers = [b for n, b in model.state_dict().items() if n.endswith("e_score_correction_bias")]
    if not buffers:
        return True
    before, kept = routes(model, inputs), [buffer.clone() for buffer in buffers]
    for buffer in buffers:
        buffer.zero_()
    after = routes(model, inputs)
    for buffer, value in zip(buffers, kept, strict=True):
        buffer.copy_(value)
    return all((before[n] != after[n]).any(dim=-1).float().mean() > 0.1 for n in before)


def reference(model, inputs, config):
    """Returns all arrays of reference.npz, None if the seed is not good enough."""
    with torch.no_grad():
        arrays = losses(model, inputs)
        for prefix, length in (("", PROMPT), ("lpad.", PADDED_PROMPT)):
            tokens, logits = greedy(model, inputs, prefix)
            if not is_decided(tokens, logits, length):
                return None
            arrays |= {f"{prefix}gen.tokens": tokens, f"{prefix}gen.logits": logits}
        if not is_stable(model, inputs) or not bias_matters(model, inputs):
            return None
        recorder = Recorder(model)
        forward(model, inputs)
        arrays |= recorder.stop()
    hottest = {}
    for name, indices in arrays.items():
        if name.startswith("router.") and name.endswith(".indices"):
            counts = torch.bincount(indices.flatten(), minlength=1)
            num_routed = getattr(config, "n_routed_experts", None) or len(counts)
            hottest[int(name.split(".")[1])] = int(counts[:num_routed].argmax())
    with tempfile.TemporaryDirectory() as folder:
        tensors = gradients(model, inputs, "loss_lm", config, Path(folder))
        num_layers = len(parts_of(model)[0])
        for name, tensor in chosen_gradients(tensors, hottest, num_layers).items():
            arrays[f"grad.{name}"] = tensor
        if "loss_total" in arrays:
            total = gradients(model, inputs, "loss_total", config, Path(folder))
            arrays |= {f"gradtotal.{n}": t for n, t in total.items() if is_router(n)}
    return arrays


def to_numpy(arrays):
    """Returns float32 and int32 arrays."""
    converted = {}
    for name, value in arrays.items():
        array = np.asarray(value.detach() if isinstance(value, torch.Tensor) else value)
        converted[name] = array.astype(np.int32 if array.dtype.kind == "i" else np.float32)
    return converted


def check_published(folder, arrays):
    """Fails unless the published spelling of the configuration gives the same logits."""
    with tempfile.TemporaryDirectory() as copy:
        copy = Path(copy)
        shutil.copy(folder / "model.safetensors", copy)
        shutil.copy(folder / "config.published.json", copy / "config.json")
        model = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32, **EXECUTION)
        with torch.no_grad():
            logits = model.eval()(torch.tensor(arrays["input_ids"], dtype=torch.long)).logits
    if not np.array_equal(logits.numpy(), arrays["logits"]):
        difference = np.abs(logits.numpy() - arrays["logits"]).max()
        raise SystemExit(f"{folder.name}: config.published.json changes logits by {difference}")


def make(name, folder):
    """Writes one family: the first seed with which every decision is clear."""
    family = FAMILIES[name]
    for seed in range(1000):
        config = AutoConfig.for_model(family.model_type, **family.settings())
        model = build(config)
        fill(model, family, seed)
        inputs = inputs_of(seed, config.vocab_size)
        with tempfile.TemporaryDirectory() as scratch:
            scratch = Path(scratch)
            save(model, scratch)
            loaded = reload(scratch, model)
            arrays = reference(loaded, inputs, config)
            if arrays is None:
                continue
            arrays = to_numpy(inputs | arrays)
            folder.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(folder / "reference.npz", **arrays)
            for file in ("config.json", "model.safetensors"):
                shutil.copy(scratch / file, folder / file)
        text = json.loads((folder / "config.json").read_text())
        spelled = json.dumps(published(text, family), indent=2)
        (folder / "config.published.json").write_text(spelled + "\n")
        if family.is_loadable:
            check_published(folder, arrays)
        size = sum(path.stat().st_size for path in folder.iterdir()) // 1024
        print(f"{name}: seed {seed}, {size} KiB, {len(arrays)} arrays", flush=True)
        return


def main():
    """Writes the families named on the command line, or all."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    folder, *names = sys.argv[1:]
    for name in names or FAMILIES:
        make(name, Path(folder) / name)


if __name__ == "__main__":
    main()
