"""Plain and private LoRA steps of transformers, PEFT and Opacus on PyTorch.

`private_fit.py` runs them next to this package's, on the same shapes.
"""

import time

import device
import numpy as np


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
    model = _model(work)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids), batch_size=batch)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-4)
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


def _model(work):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, VaultGemmaConfig

    size = work["size"]
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
    lora = LoraConfig(
        r=work["rank"],
        lora_alpha=work["rank"],
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )
    dtype = getattr(torch, work.get("dtype", "float32"))
    with device.torch_device():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return get_peft_model(model, lora).train()
