"""GPUs that people have: what nvidia-smi and their maker's data sheets say of them.

Memory is what nvidia-smi calls "total", in MiB: less than the box says, and up to 3 % more than a
program finds, as the driver keeps a part. Every figure stands in several public outputs of
`nvidia-smi --query-gpu=name,memory.total` or of its table (T4, A10, A10G, A40, L4, L40, L40S: with
ECC on, as they come; A5000, A6000, RTX Ada: with it off, as they come).

Matrix rates are dense (sheets often print twice as much, "with sparsity"), with sums in fp32, as
training wants them. Before Ampere there is no bf16, and the rate is fp16's. Where rates and
bandwidths come from; most of them were not read in their sheet again for this table:
- GeForce: the "AI TOPS" on NVIDIA's comparison pages, which are sparse and have fp16 sums, over 4
  (30 series: fp16), 8 (40: fp8) or 16 (50: fp4): such cards do fp32 sums at half the rate. For the
  3080, 3090, 4090 and 5090 that is what the architectures' whitepapers print. Laptops: at the
  highest power a maker may allow; many allow half of it.
- Workstations and servers: the data sheet of each card; RTX A and RTX Ada: a half or a quarter of
  its sparse tensor rate. RTX PRO 6000: its FP4 TOPS over 8.
Bandwidths: the same pages and sheets; V100's rate is SXM2's (PCIe: 112).

Uncertain, computed rather than read in a sheet: the rates of rtx4000ada (fp32's times 4, as on the
other Ada cards) and of rtxpro6000-server (the same), and what b300 shares with b200. Memory was
compared with such outputs when the table was made; rates and bandwidths with a second source only
for T4, A4000, 5080, RTX PRO 6000 and the 4090's and 5090's laptops.

PCIe is one way, of 16 lanes: 16 GB/s (generation 3), 32 (4) or 64 (5) by the standard, of which 12,
25 and 50 are what copies from pinned memory commonly reach; half of it with 8 lanes. GH200's is
NVLink: 450 by the sheet, 350 by the same share, which nobody measured here.
"""

from dataclasses import dataclass

BF16_FROM = (8, 0)  # compute capability: older cards lack bf16, and no kernel is built for them


@dataclass(frozen=True)
class Card:
    """One GPU model, or a slice of one (MIG)."""

    name: str
    memory: int  # bytes
    bandwidth: float  # of its memory, bytes/s
    bf16: float  # FLOP/s
    fp8: float  # FLOP/s, 0 where it has no FP8
    capability: tuple[int, int]
    pcie: float  # bytes/s, one way, from pinned memory

    @property
    def fp8_gemm(self) -> bool:
        return self.capability >= (8, 9)


def _card(
    name: str, called: str, mib: int, gb_s: float, bf16: float, fp8: float,
    capability: tuple[int, int], pcie: float,
) -> tuple[Card, tuple[str, ...]]:  # fmt: skip
    card = Card(name, mib << 20, gb_s * 1e9, bf16 * 1e12, fp8 * 1e12, capability, pcie * 1e9)
    return card, (name, *called.split(", "))


# name, what nvidia-smi calls it (less NVIDIA, GeForce, Tesla) and people do, MiB, GB/s,
# bf16 and fp8 TFLOP/s, capability, PCIe GB/s
_TABLE = (
    _card("v100-16", "V100-SXM2-16GB, V100-PCIE-16GB", 16384, 900, 125, 0, (7, 0), 12),
    _card("v100-32", "V100-SXM2-32GB, V100-PCIE-32GB", 32768, 900, 125, 0, (7, 0), 12),
    _card("t4", "T4", 15360, 320, 65, 0, (7, 5), 12),
    _card("rtx3060", "RTX 3060", 12288, 360, 25.5, 0, (8, 6), 25),
    _card("rtx3070", "RTX 3070", 8192, 448, 40.7, 0, (8, 6), 25),
    _card("rtx3080", "RTX 3080", 10240, 760, 59.5, 0, (8, 6), 25),
    _card("rtx3080ti", "RTX 3080 Ti", 12288, 912, 68.2, 0, (8, 6), 25),
    _card("rtx3090", "RTX 3090", 24576, 936, 71, 0, (8, 6), 25),
    _card("rtx3090ti", "RTX 3090 Ti", 24564, 1008, 80, 0, (8, 6), 25),
    _card("rtxa4000", "RTX A4000", 16376, 448, 76.7, 0, (8, 6), 25),
    _card("rtxa5000", "RTX A5000", 24564, 768, 111.1, 0, (8, 6), 25),
    _card("rtxa6000", "RTX A6000", 49140, 768, 154.8, 0, (8, 6), 25),
    _card("a10", "A10", 23028, 600, 125, 0, (8, 6), 25),
    _card("a10g", "A10G", 23028, 600, 70, 0, (8, 6), 25),
    _card("a40", "A40", 46068, 696, 149.7, 0, (8, 6), 25),
    _card("a30", "A30", 24576, 933, 165, 0, (8, 0), 25),
    _card("a100-40", "A100-SXM4-40GB, A100-PCIE-40GB", 40960, 1555, 312, 0, (8, 0), 25),
    _card("a100-80", "A100-SXM4-80GB, A100 80GB", 81920, 2039, 312, 0, (8, 0), 25),
    _card("a100-80-pcie", "A100 80GB PCIe", 81920, 1935, 312, 0, (8, 0), 25),
    _card("rtx4060", "RTX 4060", 8188, 272, 30.2, 60.5, (8, 9), 12),
    _card("rtx4060ti-8", "RTX 4060 Ti", 8188, 288, 44.1, 88.2, (8, 9), 12),
    _card("rtx4060ti-16", "RTX 4060 Ti", 16380, 288, 44.1, 88.2, (8, 9), 12),
    _card("rtx4070", "RTX 4070", 12282, 504, 58.3, 116.6, (8, 9), 25),
    _card("rtx4070super", "RTX 4070 SUPER", 12282, 504, 71, 142, (8, 9), 25),
    _card("rtx4070ti", "RTX 4070 Ti", 12282, 504, 80.1, 160.2, (8, 9), 25),
    _card("rtx4070tisuper", "RTX 4070 Ti SUPER", 16376, 672, 88.2, 176.5, (8, 9), 25),
    _card("rtx4080", "RTX 4080", 16376, 717, 97.5, 195, (8, 9), 25),
    _card("rtx4080super", "RTX 4080 SUPER", 16376, 736, 104.5, 209, (8, 9), 25),
    _card("rtx4090", "RTX 4090", 24564, 1008, 165.2, 330.3, (8, 9), 25),
    _card("rtx4060laptop", "RTX 4060 Laptop GPU", 8188, 256, 29.1, 58.2, (8, 9), 12),
    _card("rtx4070laptop", "RTX 4070 Laptop GPU", 8188, 256, 40.1, 80.2, (8, 9), 12),
    _card("rtx4080laptop", "RTX 4080 Laptop GPU", 12282, 432, 67.7, 135.5, (8, 9), 25),
    _card("rtx4090laptop", "RTX 4090 Laptop GPU", 16376, 576, 85.7, 171.5, (8, 9), 25),
    _card("rtx4000ada-sff", "RTX 4000 SFF Ada Generation", 20475, 280, 76.7, 153.4, (8, 9), 25),
    _card("rtx4000ada", "RTX 4000 Ada Generation", 20475, 360, 106.8, 213.6, (8, 9), 25),
    _card("rtx5000ada", "RTX 5000 Ada Generation", 32760, 576, 261.1, 522.2, (8, 9), 25),
    _card("rtx6000ada", "RTX 6000 Ada Generation", 49140, 960, 364.2, 728.5, (8, 9), 25),
    _card("l4", "L4", 23034, 300, 121, 242, (8, 9), 25),
    _card("l40", "L40", 46068, 864, 181, 362, (8, 9), 25),
    _card("l40s", "L40S", 46068, 864, 362, 733, (8, 9), 25),
    _card("h100-pcie", "H100 PCIe", 81559, 2000, 756, 1513, (9, 0), 50),
    _card("h100-80", "H100 80GB HBM3, H100 SXM", 81559, 3350, 989, 1979, (9, 0), 50),
    _card("h100-nvl", "H100 NVL", 95830, 3900, 835, 1671, (9, 0), 50),
    _card("h20", "H20", 97871, 4000, 148, 296, (9, 0), 50),
    _card("gh200", "GH200 480GB", 97871, 4000, 989, 1979, (9, 0), 350),
    _card("h200", "H200, H200 SXM", 143771, 4800, 989, 1979, (9, 0), 50),
    _card("h200-nvl", "H200 NVL", 143771, 4800, 835, 1671, (9, 0), 50),
    _card("b200", "B200", 183359, 8000, 2250, 4500, (10, 0), 50),
    _card("b300", "B300 SXM6 AC", 275040, 8000, 2250, 4500, (10, 3), 50),
    _card("rtx5060ti-8", "RTX 5060 Ti", 8151, 448, 47.4, 94.9, (12, 0), 25),
    _card("rtx5060ti-16", "RTX 5060 Ti", 16311, 448, 47.4, 94.9, (12, 0), 25),
    _card("rtx5070", "RTX 5070", 12227, 672, 61.7, 123.5, (12, 0), 50),
    _card("rtx5070ti", "RTX 5070 Ti", 16303, 896, 87.9, 175.7, (12, 0), 50),
    _card("rtx5080", "RTX 5080", 16303, 960, 112.6, 225.1, (12, 0), 50),
    _card("rtx5090", "RTX 5090", 32607, 1792, 209.5, 419, (12, 0), 50),
    _card("rtx5070tilaptop", "RTX 5070 Ti Laptop GPU", 12227, 672, 62, 124, (12, 0), 50),
    _card("rtx5080laptop", "RTX 5080 Laptop GPU", 16303, 896, 83.4, 166.7, (12, 0), 50),
    _card("rtx5090laptop", "RTX 5090 Laptop GPU", 24463, 896, 114, 228, (12, 0), 50),
    _card(
        "rtxpro6000", "RTX PRO 6000 Blackwell Workstation Edition", 97887, 1792, 500, 1000,
        (12, 0), 50,
    ),
    _card(
        "rtxpro6000-maxq", "RTX PRO 6000 Blackwell Max-Q Workstation Edition", 97887,
        1792, 439, 878, (12, 0), 50,
    ),
    _card(
        "rtxpro6000-server", "RTX PRO 6000 Blackwell Server Edition", 97887, 1597, 480, 960,
        (12, 0), 50,
    ),
)  # fmt: skip
CARDS = {card.name: card for card, _ in _TABLE}
NAMES = [(one, card.name) for card, called in _TABLE for one in called]

# Slices of a card (MIG), as `nvidia-smi mig -lgip` lists them: GiB and multiprocessors. Uncertain:
# H200's of 71 GB (from PyTorch's 69.8 GiB) and 1g.35gb (as 2g.35gb), and all of H100 PCIe (as SXM).
# B200 and later: no such list was found, so none are here.
_A100 = {
    "1g.10gb": (9.5, 14), "1g.20gb": (19.5, 14), "2g.20gb": (19.5, 28), "3g.40gb": (39.25, 42),
    "4g.40gb": (39.25, 56), "7g.80gb": (79, 98),
}  # fmt: skip
_H100 = {
    "1g.10gb": (9.75, 16), "1g.20gb": (19.62, 26), "2g.20gb": (19.62, 32), "3g.40gb": (39.5, 60),
    "4g.40gb": (39.5, 64), "7g.80gb": (79.25, 132),
}  # fmt: skip
SLICES: dict[str, dict[str, tuple[float, int]]] = {
    "a30": {"1g.6gb": (5.81, 14), "2g.12gb": (11.69, 28), "4g.24gb": (23.44, 56)},
    "a100-40": {
        "1g.5gb": (4.75, 14), "1g.10gb": (9.75, 14), "2g.10gb": (9.75, 28), "3g.20gb": (19.62, 42),
        "4g.20gb": (19.62, 56), "7g.40gb": (39.5, 98),
    },
    "a100-80": _A100,
    "a100-80-pcie": _A100,
    "h100-80": _H100,
    "h100-pcie": _H100,
    "h200": {
        "1g.18gb": (16, 16), "1g.35gb": (32.5, 26), "2g.35gb": (32.5, 32), "3g.71gb": (69.75, 60),
        "4g.71gb": (69.75, 64), "7g.141gb": (140, 132),
    },
}  # fmt: skip
MULTIPROCESSORS = {
    "a30": 56, "a100-40": 108, "a100-80": 108, "a100-80-pcie": 108, "h100-80": 132,
    "h100-pcie": 114, "h200": 132,
}  # fmt: skip
