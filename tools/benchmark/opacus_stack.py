"""The official cookbook's stack: transformers, PEFT and Opacus on PyTorch.

`private_fit.py` measures plain and private LoRA steps of it next to this package's, on the same
shapes. `private_qa.py` and `cookbook_recipe.py` train with it, too.
"""

import time

import device
import numpy as np

PROJECTIONS = {
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "attention_output": "o_proj",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
}
"""PEFT's names of the layers that can have an adapter."""


def measure(peer, work):
    """Measure seconds per step and memory of a few steps, as `private_fit.measure` does.

    Args:
        peer: str. "peft" for plain steps, "opacus" for private ones.
        work: dict, one of `private_fit.WORKS`.

    Returns:
        Dict of figures.
    """
    import torch
    from opacus import PrivacyEngine

    torch.manual_seed(0)
    batch, length, steps = work["batch"], work["length"], work["steps"]
    ids = torch.randint(5, work["size"]["vocabulary_size"], (batch * steps, length))
    at = device.torch_device()
    model = random_vaultgemma(work["size"], work.get("dtype", "float32"))
    model = add_lora(model, work["rank"], ("query", "value"))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids), batch_size=batch)
    optimizer = torch.optim.Adam(trained_parameters(model), lr=1e-4)
    if peer == "opacus":
        model, optimizer, loader = PrivacyEngine().make_private(
            module=model,
            optimizer=optimizer,
            data_loader=loader,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,  # the same number of rows in each step
        )
    positions = torch.arange(length, device=at)[None]
    seconds, before = [], device.reset_peak()
    for (x,) in loader:
        start = time.perf_counter()
        x = x.to(at)
        # Opacus needs positions of each row.
        model(input_ids=x, labels=x, position_ids=positions.repeat(len(x), 1)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        device.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = device.peak()
    return {
        "step_s": float(np.mean(seconds[1:])),
        "gb_above_model": (peak - before) / 1e9,
        "peak_gb": peak / 1e9,
        "first_step_s": seconds[0],
        "timed_rows": batch * (steps - 1),
    }


def random_vaultgemma(size, dtype="float32"):
    """Return a `VaultGemmaForCausalLM` with random weights, on the GPU if there is one.

    Args:
        size: dict of arguments of `VaultGemmaBackbone`.
        dtype: string. Dtype of the weights. Defaults to "float32".
    """
    import torch
    from transformers import AutoModelForCausalLM, VaultGemmaConfig

    config = VaultGemmaConfig(
        vocab_size=size["vocabulary_size"],
        hidden_size=size["hidden_dim"],
        intermediate_size=size["intermediate_dim"],
        num_hidden_layers=size["num_layers"],
        num_attention_heads=size["num_query_heads"],
        num_key_value_heads=size["num_key_value_heads"],
        head_dim=size["head_dim"],
        query_pre_attn_scalar=size["head_dim"],
        max_position_embeddings=1024,
        layer_types=["full_attention"] * size["num_layers"],
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
    )
    with device.torch_device():
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))


def add_lora(model, rank, targets=tuple(PROJECTIONS), alpha=None, dropout=0.0):
    """Return a model with an adapter of PEFT, in training mode.

    Args:
        model: `VaultGemmaForCausalLM`.
        rank: int.
        targets: names of layers, as this package has them. Defaults to all projections.
        alpha: float. Defaults to `rank`.
        dropout: float. Defaults to 0.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=[PROJECTIONS[name] for name in targets],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config).train()


def trained_parameters(model):
    """Return the parameters that have a gradient."""
    return [p for p in model.parameters() if p.requires_grad]
