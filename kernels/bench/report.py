"""The benchmark's tables: on the screen, in a CSV, and what they say of where we lose."""

import csv
import datetime
import math
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

# N, D, V -> the loss over three bare products, linear_topk over one
TARGETS = {
    (16384, 768, 50304): {"linear_topk_kl": 1.25, "linear_topk": 1.60},
    (8192, 2048, 128256): {"linear_topk_kl": 1.15, "linear_topk": 1.25},
    (8192, 4096, 151936): {"linear_topk_kl": 1.10, "linear_topk": 1.12},
    (2048, 384, 50304): {"linear_topk_kl": 1.10, "linear_topk_kl T=2": 1.25},  # a CPU's
}
MEMORY_SHARE = 1 / 5  # of plain PyTorch's peak
FULL_SHARE = 2.2  # linear_full_kl over linear_topk_kl
PEERS = ("liger_kernel", "cut-cross-entropy")


def show(rows: list[dict]) -> None:
    """One table, its rows timed in the same rounds."""
    first = rows[0]
    sizes = " ".join(f"{key}={first[key]}" for key in ("N", "D", "V", "K"))
    print(f"\n{first['table']} {sizes} {first['dtype']}")
    print(f"{'case':28} {'ms':>28} {'ratio to floor':>22} {'MiB':>7} {'grad error':>10}")
    for row in rows:
        ms = "{ms:.3f} ({ms_low:.3f}-{ms_high:.3f})".format(**row)
        ratio = "{ratio:.3f} ({ratio_low:.2f}-{ratio_high:.2f})".format(**row)
        error = f"{row['grad_error']:.1e}"
        figures = f"{ms:>28} {ratio:>22} {row['peak_mib']:7.0f} {error:>10}"
        print(f"{row['case']:28} {figures} {row['note']}")


def shortfalls(rows: list[dict]) -> list[str]:
    """Where we lose in a table: targets missed, and rivals that are faster or leaner."""
    first = rows[0]
    where = f"{first['table']} N={first['N']} D={first['D']} V={first['V']}"
    targets = TARGETS.get((first["N"], first["D"], first["V"]), {})
    named = {row["case"]: row for row in rows}
    ours = {row["work"]: row for row in rows if row["group"] == "ours"}
    found = []
    for row in rows:
        case = row["case"]
        if row["group"] == "ours" and row["note"]:
            found.append(f"{case} failed: {row['note']}")
        if row["ratio"] > targets.get(case, math.inf):
            found.append(f"{case}: {row['ratio']:.3f} of its floor, target {targets[case]}")
        own = ours.get(row["work"])
        if own is None or row is own or row["note"]:
            continue
        if row["ms"] < own["ms"]:
            wrong = ""
            if row["grad_error"] > 5e-3:
                wrong = f" (its gradient is {row['grad_error']:.1%} off)"
            times = f"{row['ms']:.4g} ms, not {own['ms']:.4g}"
            found.append(f"{case} is faster than {own['case']}: {times}{wrong}")
        if row["group"] in ("peer", "torch") and row["peak_mib"] < own["peak_mib"]:
            sizes = f"{row['peak_mib']:.0f} MiB, not {own['peak_mib']:.0f}"
            found.append(f"{case} is leaner than {own['case']}: {sizes}")
    if "plain" in named and "linear_topk_kl" in named:
        share = named["linear_topk_kl"]["peak_mib"] / named["plain"]["peak_mib"]
        if share > MEMORY_SHARE:
            found.append(
                f"linear_topk_kl: {share:.3f} of plain's peak memory, target {MEMORY_SHARE}"
            )
    if "linear_full_kl" in named:
        share = named["linear_full_kl"]["ms"] / named["linear_topk_kl"]["ms"]
        if share > FULL_SHARE:
            found.append(f"linear_full_kl: {share:.2f} of linear_topk_kl, target {FULL_SHARE}")
    return [f"{where}: {line}" for line in found]


def record(path: Path, rows: list[dict]) -> None:
    """Appends rows to a CSV; columns that the file does not have yet come after its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = []
    if path.exists():
        with open(path, newline="") as stream:
            old = list(csv.DictReader(stream))
    rows = [*old, *rows]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    fresh = path.with_suffix(".partial")
    with open(fresh, "w", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)
    fresh.replace(path)


def output_of(*command: str) -> str:
    """What a program prints, "unknown" where it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def processor() -> str:
    if platform.system() != "Linux":
        return platform.processor()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def facts(device: torch.device, commit: str | None) -> dict:
    """Machine, versions, commit and time: what stands beside every figure."""
    installed = {part.metadata["Name"]: part.version for part in metadata.distributions()}
    on_gpu = device.type == "cuda"
    driver = ""
    if on_gpu:
        query = ("--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        driver = output_of("nvidia-smi", *query)
    folder = str(Path(__file__).parent)
    return {
        "device": torch.cuda.get_device_name() if on_gpu else processor(),
        "driver": driver,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": installed.get("triton", "none"),
        "peers": " ".join(f"{name}-{installed[name]}" for name in PEERS if name in installed),
        "python": platform.python_version(),
        "commit": commit or output_of("git", "-C", folder, "describe", "--always", "--dirty"),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
