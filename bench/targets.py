"""What the project means to reach: least ratios to peers, and least shares of the measured copy bandwidth, by (op, direction).

CPU: at the preset "design", float32, two cores; group attention's "eager" is the better of eager and SDPA there. GPU: at the
preset "gpu", bfloat16, of Hopper's class.
"""

FORWARD, BOTH = "forward", "forward+backward"
BANDWIDTH = "copy bandwidth"

CPU = ("design", "float32")
GPU = ("gpu", "bfloat16")

_AUTOTUNED = "compile-max-autotune"
TARGETS: dict[tuple[str, str], dict[tuple[str, str], dict[str, float]]] = {
    CPU: {
        ("route", FORWARD): {"eager": 4.5, "compile": 2.4},
        ("route", BOTH): {"eager": 3.5, "compile": 2.2},
        ("leave_one_out", FORWARD): {"eager": 11.0, "compile": 6.5},
        ("counterfactual_losses", FORWARD): {"eager": 7.0, "compile": 1.7},
        ("group_attention", FORWARD): {"eager or sdpa": 10.0, "compile": 6.5},
        ("group_attention", BOTH): {"eager or sdpa": 8.0, "compile": 5.0},
        ("alignment_loss", BOTH): {"eager": 10.0, "compile": 3.0},
        ("competency_aggregate", FORWARD): {"eager": 4.0, "compile": 1.6},
    },
    GPU: {
        ("route", FORWARD): {BANDWIDTH: 0.60, "eager": 10.0, _AUTOTUNED: 2.0},
        ("route", BOTH): {BANDWIDTH: 0.50, "eager": 8.0, _AUTOTUNED: 2.0},
        ("leave_one_out", FORWARD): {BANDWIDTH: 0.90},
        ("counterfactual_losses", FORWARD): {"eager": 8.0, _AUTOTUNED: 2.0},
        ("group_attention", FORWARD): {BANDWIDTH: 0.85, "sdpa": 10.0, "flash-attn": 10.0, "xformers": 10.0},
        ("group_attention", BOTH): {BANDWIDTH: 0.75},
        ("competency_aggregate", FORWARD): {BANDWIDTH: 0.85},
    },
}
