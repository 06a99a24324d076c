"""A generator of LoRA adapters: of a language model with half a billion parameters, on a laptop.

A model of the size and shape of Qwen2-0.5B, with random weights so that nothing is downloaded, learns a sentence by its
LoRA matrices alone. Their last steps are recorded, a generator is fitted, and new adapters are put into the model: the
loss and what it goes on to say are printed beside those of the trained ones, then those of four adapters as an
ensemble.

    pip install peft transformers
    python examples/lora_language_model.py            # two minutes on two CPU cores, 3 GB of memory
    python examples/lora_language_model.py --smoke    # a tiny model
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2Config

from pdiff_plugin import FitConfig, PDiffRecorder, SnapshotStore, ensemble_from_diffusion, fit

SENTENCE = "Weights that were trained are a distribution one can learn."
# What the model is to go on from.
NUM_PROMPT = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for store and fit; a temporary one unless given")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--snapshots", type=int, default=40)
    parser.add_argument("--smoke", action="store_true", help="a tiny model")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp(prefix="pdiff-lora-"))
    torch.manual_seed(0)
    model = get_peft_model(
        language_model(tiny=options.smoke),
        LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {num_trained:,} of them trained")
    # Bytes as tokens: there is no tokenizer without a download.
    tokens = torch.tensor([list(SENTENCE.encode())])
    tell("before training", model, tokens)

    start = time.perf_counter()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    # "lora" finds the matrices that PEFT added. The rest of the model is not needed beside them.
    recorder = PDiffRecorder(out / "store", layers="lora", last_steps=options.snapshots, save_base=False)
    with recorder.attach(model, optimizer, total_steps=options.steps):
        for _ in range(options.steps):
            optimizer.zero_grad()
            loss_of(model, tokens).backward()
            optimizer.step()
    print(f"{options.steps} steps in {time.perf_counter() - start:.0f} s")
    tell("trained", model, tokens)

    store = SnapshotStore.open(out / "store")
    print(f"{len(store)} snapshots of {store.layout.num_values:,} values")
    generator = fit(store, FitConfig(), out=out / "fit")
    for seed in range(2):
        generator.sample_into(model, rng=torch.Generator().manual_seed(seed))
        tell(f"generated adapter {seed}", model, tokens)
    ensemble = ensemble_from_diffusion(
        model.eval(),
        generator,
        num_members=4,
        rng=torch.Generator().manual_seed(0),
        ensemble_options={"class_axis": 2},
    )
    print(f"four generated adapters: loss {float(cross_entropy(ensemble(tokens), tokens)):.3f}")
    print(f"The most memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")


def language_model(*, tiny: bool) -> nn.Module:
    """A Qwen2 of half a billion parameters in bfloat16, or a tiny one."""
    sizes = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 151936}
    heads = {"num_attention_heads": 14, "num_key_value_heads": 2}
    if tiny:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen2Config(**sizes, **heads, tie_word_embeddings=True, use_cache=False)
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return cross_entropy(model(tokens).logits, tokens)


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Of each token but the first, given those before it."""
    return F.cross_entropy(logits[0, :-1].float(), tokens[0, 1:])


@torch.no_grad()
def tell(name: str, model: nn.Module, tokens: Tensor) -> None:
    """Print the loss, and what the model goes on to say."""
    model.eval()
    loss, said = float(loss_of(model, tokens)), tokens[:, :NUM_PROMPT]
    while said.shape[1] < tokens.shape[1]:
        said = torch.cat([said, model(said).logits[:, -1:].argmax(-1)], dim=1)
    text = "".join(chr(token) if 32 <= token < 127 else "·" for token in said[0].tolist())
    print(f"{name}: loss {loss:.3f}, {text!r}")
    model.train()


if __name__ == "__main__":
    main()
