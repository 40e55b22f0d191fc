"""`benchmark.py data`: samples and ready batches on one core."""

from benchmark_processes import Arms
from benchmark_report import between, ratio, spread, times
from benchmark_setup import data_set, opponents, workload

DATA_STAGES = {
    "target": "decode, mirror, targets",
    "batch": "resized, normalised, padded batch",
    "lsj": "large-scale jitter",
    "copypaste": "large-scale jitter, copy-paste",
}


def run_data(args, report, folder):
    """Images per second of one core: decode and targets, ready batches, large-scale jitter."""
    data = data_set(args, folder, args.images)
    peers = opponents(args, ("torchvision",))
    measured = {}
    for stage in DATA_STAGES:
        work = {**workload(args, data, batch_size=args.batch_size), "device": "cpu"}
        with Arms(report) as arms:
            for name in ["ours", *peers]:
                arms.open("data", name, work, stage=stage)
            arms.ask_all("turn", first=0, count=args.batch_size)
            rounds = arms.take_turns(
                args.rounds, lambda n: arms.all_do("turn", first=n * args.images, count=args.images)
            )
            measured[stage] = {"rounds": rounds, "memory": arms.ask_all("memory")}
        report.keep(stage, measured[stage])
    rows = []
    for stage, found in measured.items():
        seconds = {
            name: [t["seconds"] / t["images"] for t in found["rounds"][name]] for name in found["memory"]
        }
        for name, own in seconds.items():
            rates = spread([1 / value for value in own])
            row = [DATA_STAGES[stage], name, rates["median"], between(rates)]
            rows.append([*row, times(ratio(own, seconds["ours"])), found["memory"][name]["host_mb"]])
    columns = ["up to", "arm", "img/s per core", "range", "time ÷ ours, rounds / medians", "peak MB"]
    report.table("Data, one thread", columns, rows)
