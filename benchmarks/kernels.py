"""Error and speed of 8-bit products with each kernel, with fewer and fewer instructions of the processor.

Runs itself with all instructions of this processor, and with environment variables that forbid some. Prints a
Markdown table; takes about two minutes on one core.
"""

import argparse
import functools
import os
import subprocess
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import far
from far import kernels
from far.benchmark import machine, paired
from far.packing import Int8Linear, PackedLinear, quantize_linear_layers

ROWS = (1, 16, 64, 256)
INT8 = {f"int8, {kernel}": kernel for kernel in kernels.INT8_KERNELS}
INPUTS, OUTPUTS = 768, 3072  # far-b's widest layers
MASKS = {
    "all of this processor": {},
    "AVX-512 without VNNI": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "FBGEMM_ENABLE_INSTRUCTIONS": "AVX512"},
    "AVX2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
    },
}


def relative_rms(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).pow(2).mean() / exact.pow(2).mean()).sqrt().item()


def images(kernel: kernels.Int8Kernel | None) -> Tensor:
    """Return 16 images of avatars-64, in float32 or with the 8-bit weights of a kernel."""
    pipeline = far.load("avatars-64")
    if kernel is not None:
        quantize_linear_layers(pipeline.model, kernel)
    return pipeline.generate(list(range(16)), seed=0, output="tensor")  # type: ignore[return-value]


@torch.no_grad()
def report(instructions: str, rounds: int) -> None:
    """Print this process's rows of the table."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(INPUTS, OUTPUTS, bias=False)
    linear.weight.normal_(generator=generator)
    x = torch.randn(max(ROWS), INPUTS, generator=generator)
    exact, plain = x.double() @ linear.weight.double().T, images(None)
    low = nn.Linear(INPUTS, OUTPUTS, bias=False, dtype=torch.bfloat16)
    low.weight.copy_(linear.weight)
    layers = {
        "float32": linear,
        **{name: Int8Linear(linear, kernel) for name, kernel in INT8.items()},
    }
    layers["bfloat16"] = PackedLinear(low) if kernels.bfloat16_fault() is None else low
    for name, layer in layers.items():
        inputs = x.to(torch.bfloat16) if name == "bfloat16" else x
        seconds = paired({str(rows): functools.partial(layer, inputs[:rows]) for rows in ROWS}, rounds)
        times = [f"{1e6 * min(seconds[str(rows)]):.0f}" for rows in ROWS]
        error, difference, verdict = f"{relative_rms(layer(inputs), exact):.4f}", "", ""
        if name in INT8:
            kernel = INT8[name]
            wrong = kernels.int8_error(kernel)
            verdict = "exact" if kernels.int8_fault(kernel) is None else f"wrong by up to {wrong:.0%}"
            difference = f"{255 * F.l1_loss(images(kernel), plain):.2f}"
        print(f"| {' | '.join([instructions, name, verdict, error, difference, *times])} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=20, help="rounds, of which the fastest counts (default 20)"
    )
    parser.add_argument(
        "--only", choices=list(MASKS), help="print only these rows, without changing variables"
    )
    arguments = parser.parse_args()
    if arguments.only:
        report(arguments.only, arguments.rounds)
        return
    print(
        f"A layer of {INPUTS} × {OUTPUTS}, n rows of normal inputs, seed 0, {machine()}; variables:", end=" "
    )
    print(
        "; ".join(f"{name}: {' '.join(map('='.join, mask.items()))}" for name, mask in MASKS.items() if mask)
    )
    columns = ["instructions", "weights", "products", "relative RMS error", "difference of pixels (of 255)"]
    print(f"\n| {' | '.join([*columns, *(f'{rows} rows, µs' for rows in ROWS)])} |")
    print(f"|{'---|' * (len(columns) + len(ROWS))}")
    sys.stdout.flush()
    for name, mask in MASKS.items():
        command = [
            sys.executable,
            "-m",
            "benchmarks.kernels",
            "--only",
            name,
            "--rounds",
            str(arguments.rounds),
        ]
        subprocess.run(command, env={**os.environ, **mask}, check=True)


if __name__ == "__main__":
    main()
