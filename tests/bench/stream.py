"""Online clustering on a replayed stream: quality, reaction to change, speed.

    OMP_NUM_THREADS=1 python tests/bench/stream.py --data ../shared/data --out runs/stream

Domains of the data folder are mixed, with drift, bursts and a domain never seen before that comes
and goes. Every request is assigned under the snapshot that routers had when it came, and learned
afterwards. Writes stream.json, stream.md and stream.png to `--out`. The peers need the `bench`
extra (scikit-learn, river, matplotlib); those that are missing are left out, with a message.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import stream_peers as peers
import stream_scale as scale
from numpy.typing import NDArray
from stream_data import Documents, Plan, load_documents, make_stream

from cluster_router.learner import CentroidLearner
from cluster_router.learning.config import LearnerConfig
from cluster_router.wire.snapshot import ClusterSnapshot
from training.clusters import fit_snapshot, mutual_information
from training.config import ClusterSettings

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]
OFFLINE = "offline k-means"
RECENT = 1000  # requests over which a cluster's present members are counted


@dataclass(frozen=True, eq=False)
class Replay:
    """What the learner did: a label for each request; counts at each publication."""

    labels: Labels
    clusters: list[int]
    born: list[int]
    moved: list[int]


def replay(start: ClusterSnapshot, rows: Floats, every: int) -> Replay:
    """Assign, then learn, `every` requests at a time."""
    learner, snapshot = CentroidLearner(start, LearnerConfig()), start
    result = Replay(np.full(len(rows), peers.NONE), [], [], [])
    for at in range(0, len(rows), every):
        batch = rows[at : at + every]
        if len(snapshot):
            similarity = snapshot.project(batch) @ snapshot.centroids.T
            inside = similarity.max(1) >= snapshot.threshold
            result.labels[at : at + every] = np.where(
                inside, snapshot.ids[similarity.argmax(1)], peers.NONE
            )
        learner.learn(batch)
        before, snapshot = snapshot, learner.snapshot()
        new = ~np.isin(snapshot.ids, before.ids)
        result.born.append(int(new.sum()))
        result.moved.append(int(((snapshot.versions == snapshot.version) & ~new).sum()))
        result.clusters.append(len(snapshot))
    return result


def purity(labels: Labels, domains: NDArray[np.str_]) -> float:
    """Share of requests whose domain is the commonest of their cluster."""
    _, columns = np.unique(domains, return_inverse=True)
    return float(
        sum(np.bincount(columns[labels == label]).max() for label in np.unique(labels))
        / len(labels)
    )


def score(labels: Labels, domains: NDArray[np.str_]) -> dict[str, float]:
    """NMI and purity; requests of no cluster count as one cluster more."""
    domains = domains[: len(labels)]
    return {
        "requests": len(labels),
        "clusters": len(np.unique(labels)),
        "nmi": mutual_information(labels, domains.tolist()),
        "purity": purity(labels, domains),
    }


def novel_reaction(labels: Labels, domains: NDArray[np.str_], novel: str) -> dict[str, Any]:
    """How soon novel traffic has clusters of its own.

    A novel request is at home if it was assigned to a cluster of whose last 1,000 requests' worth
    of members at least half are novel. `settled_after` is the number of novel requests after which
    at least half of the next 50 are at home.
    """
    places = np.flatnonzero(domains == novel)
    home = np.zeros(len(places), bool)
    for turn, place in enumerate(places):
        recent = slice(max(0, place - RECENT), place + 1)
        mates = domains[recent][labels[recent] == labels[place]]
        home[turn] = labels[place] != peers.NONE and (mates == novel).mean() >= 0.5
    settled = [at for at in range(0, len(home) - 50, 10) if home[at : at + 50].mean() >= 0.5]
    return {
        "novel_requests": len(places),
        "settled_after": settled[0] if settled else None,
        "at_home_after_200": float(home[200:].mean()) if len(home) > 200 else None,
    }


def starting_snapshot(documents: Documents, novel: str, count: int, seed: int) -> ClusterSnapshot:
    """Clusters as a bundle brings them, of documents that the stream does not hold."""
    known = ~documents.streamed & (documents.domains != novel)
    return fit_snapshot(documents.embeddings[known], ClusterSettings(count=count), seed)


def available(module: str) -> bool:
    """Whether a peer is installed; says so if not."""
    found = importlib.util.find_spec(module) is not None
    if not found:
        print(f"{module} is not installed and left out; install the `bench` extra", flush=True)
    return found


def run(documents: Documents, plan: Plan, args: argparse.Namespace) -> dict[str, Any]:
    """One stream through the learner and its peers."""
    order = make_stream(documents, plan)
    rows, domains = documents.embeddings[order], documents.domains[order]
    bundle = starting_snapshot(documents, plan.novel_domain, args.clusters, plan.seed)
    warm = replay(bundle, rows, args.every)
    cold = replay(ClusterSnapshot.empty(bundle.dim), rows, args.every)
    limit = LearnerConfig().max_clusters
    count = round(float(np.mean(warm.clusters)))
    reference = peers.offline(rows, count, plan.seed)
    centred = peers.centred(rows, bundle.mean)
    table = {
        OFFLINE: score(reference, domains),
        f"{OFFLINE}, centred": score(peers.offline(centred, count, plan.seed), domains),
    }
    table["ours, from a bundle"] = score(warm.labels, domains)
    table["ours, from nothing"] = score(cold.labels, domains)
    frozen = (rows @ bundle.centroids.T).argmax(1)
    table["the bundle's clusters, never moved"] = score(frozen, domains)
    if available("sklearn"):
        for name, begin in (("from a bundle", bundle.centroids), ("from nothing", None)):
            labels = peers.mini_batch_kmeans(rows, limit, begin, args.every)
            table[f"MiniBatchKMeans, {name}"] = score(labels, domains)
        start = peers.centred(bundle.centroids, bundle.mean)
        labels = peers.mini_batch_kmeans(centred, limit, start, args.every)
        table["MiniBatchKMeans, from a bundle, centred"] = score(labels, domains)
        if args.birch:
            labels = peers.birch(rows, limit, args.every)
            table["Birch, all labelled at the end"] = score(labels, domains)
    late = int(plan.steady_from * plan.requests)
    return {
        "plan": asdict(plan),
        "table": table,
        "steady": {
            "ours": score(warm.labels[late:], domains[late:])["nmi"],
            "offline": score(reference[late:], domains[late:])["nmi"],
        },
        "river": river(documents, order, plan, args) if args.river_seconds else {},
        "reaction": reaction(warm, domains, plan, args.every),
        "timeline": {"every": args.every, "clusters": warm.clusters, "cold": cold.clusters},
    }


def river(
    documents: Documents, order: NDArray[np.int64], plan: Plan, args: argparse.Namespace
) -> dict[str, Any]:
    """River's clusterers beside ours from nothing, on few principal dimensions.

    River is plain Python: on all dimensions it gets through a few hundred requests.
    """
    if not available("river"):
        return {}
    known = documents.embeddings[~documents.streamed & (documents.domains != plan.novel_domain)]
    rows = peers.principal(documents.embeddings[order], known, args.river_dim)
    domains = documents.domains[order]
    ours = replay(ClusterSnapshot.empty(args.river_dim), rows, args.every)
    found = {}
    for name, make in peers.river_models(LearnerConfig().max_clusters).items():
        labels = peers.river(make, rows, args.river_seconds)
        same = score(ours.labels[: len(labels)], domains)
        found[name] = {**score(labels, domains), "ours_nmi": same["nmi"]}
    return found


def reaction(warm: Replay, domains: NDArray[np.str_], plan: Plan, every: int) -> dict[str, Any]:
    """Novel traffic, the number of clusters, and how many updates are regenerated."""
    at = {
        name: int(f * plan.requests) // every
        for name, f in (
            ("arrival", plan.novel[0]),
            ("end", plan.novel[1]),
            ("steady", plan.steady_from),
        )
    }
    steady = slice(at["steady"], None)
    requests = (len(warm.clusters) - at["steady"]) * every
    regenerated = (sum(warm.born[steady]) + sum(warm.moved[steady])) * 1000 / requests
    return {
        **novel_reaction(warm.labels, domains, plan.novel_domain),
        "clusters_before_novel": warm.clusters[at["arrival"] - 1],
        "clusters_most": max(warm.clusters),
        "clusters_at_end": warm.clusters[-1],
        "regenerated_per_1000_steady": regenerated,
        "regenerated_share_of_clusters": regenerated / float(np.mean(warm.clusters[steady])),
        "unassigned": float((warm.labels == peers.NONE).mean()),
    }


def figure(value: float | None) -> str:
    """For a table; what never came about is a dash."""
    return "-" if value is None else f"{value:.3g}"


def summary(runs: list[dict[str, Any]]) -> list[str]:
    """Each aim's figure in every run."""

    def share(result: dict[str, Any], name: str, value: str) -> float:
        return float(result["table"][name][value] / result["table"][OFFLINE][value])

    rows = {
        f"{name}: {value} of offline's": [share(result, name, value) for result in runs]
        for name in runs[0]["table"]
        if name != OFFLINE
        for value in ("nmi", "purity")
    }
    for name in ("settled_after", "clusters_most", "regenerated_share_of_clusters"):
        rows[name] = [result["reaction"][name] for result in runs]
    heads = [f"{r['plan']['novel_domain']}, seed {r['plan']['seed']}" for r in runs]
    return [
        f"| | {' | '.join(heads)} |\n| --- |{' --- |' * len(runs)}",
        *(f"| {name} | {' | '.join(map(figure, row))} |" for name, row in rows.items()),
    ]


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    lines = [f"# Stream bench, {report['weights']} token weights, one thread\n"]
    lines += summary(report["runs"])
    for result in report["runs"]:
        plan, table = result["plan"], result["table"]
        best = table[OFFLINE]["nmi"]
        lines += [
            f"\n## Novel domain {plan['novel_domain']}, {plan['requests']} requests, "
            f"seed {plan['seed']}\n",
            "| clusterer | labels | NMI | of offline | purity |\n| --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {name} | {row['clusters']} | {row['nmi']:.3f} | {row['nmi'] / best:.1%} "
            f"| {row['purity']:.3f} |"
            for name, row in table.items()
        ]
        steady = result["steady"]
        lines.append(
            f"\nNMI over the steady part alone: ours from a bundle {steady['ours']:.3f}, offline "
            f"{steady['offline']:.3f} ({steady['ours'] / steady['offline']:.1%})."
        )
        if result["river"]:
            lines.append(
                "\n| river, few dimensions | requests | labels | NMI | ours from nothing, same "
                "rows |\n| --- | --- | --- | --- | --- |"
            )
        lines += [
            f"| {name} | {row['requests']} | {row['clusters']} | {row['nmi']:.3f} "
            f"| {row['ours_nmi']:.3f} |"
            for name, row in result["river"].items()
        ]
        lines += [
            "",
            *(
                f"- {name}: {value if not isinstance(value, float) else round(value, 3)}"
                for name, value in result["reaction"].items()
            ),
        ]
    if "scale" in report:
        lines += [
            "\n## Scale\n",
            "| centroids | assign p50 / p99 ms | FAISS p50 / p99 ms | "
            "batch of 256: ours / FAISS, prompts per s |\n| --- | --- | --- | --- |",
        ]
        lines += [
            f"| {r['centroids']} | {r['assign_p50_ms']:.3f} / {r['assign_p99_ms']:.3f} "
            f"| {r['faiss_p50_ms']:.3f} / {r['faiss_p99_ms']:.3f} "
            f"| {r['batch_per_s']:.0f} / {r['faiss_batch_per_s']:.0f} |"
            for r in report["scale"]
        ]
        lines += [
            "",
            f"- learner, embeddings per s: {report['learner_per_s']}",
            f"- bytes per cluster: {report['bytes_per_cluster']}",
        ]
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Clusters over time."""
    if not available("matplotlib"):
        return
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    plan, timeline = result["plan"], result["timeline"]
    figure, axes = pyplot.subplots(figsize=(8, 3.5), layout="constrained")
    places = np.arange(1, len(timeline["clusters"]) + 1) * timeline["every"]
    axes.plot(places, timeline["clusters"], label="from a bundle")
    axes.plot(places, timeline["cold"], label="from nothing")
    begin, end = (f * plan["requests"] for f in plan["novel"])
    axes.axvspan(begin, end, alpha=0.15, label=f"novel domain: {plan['novel_domain']}")
    axes.set(xlabel="requests", ylabel="clusters", ylim=(0, None))
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def arguments() -> argparse.Namespace:
    """The command line."""
    default = os.environ.get("CHAMELEON_DATA", Path(__file__).parents[3] / "shared" / "data")
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=Path(default))
    parser.add_argument("--out", type=Path, default=Path("runs/stream"))
    parser.add_argument("--weights", choices=["plain", "idf"], default="idf")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--every", type=int, default=100, help="requests between publications")
    parser.add_argument("--clusters", type=int, default=48, help="clusters of the bundle")
    parser.add_argument("--novel", nargs="+", default=["pubmed", "math_problems", "sql"])
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="one a novel domain"
    )
    parser.add_argument("--birch", action="store_true", help="Birch too: slow, labels in hindsight")
    parser.add_argument("--river-seconds", type=float, default=20, help="for each model; 0: none")
    parser.add_argument("--river-dim", type=int, default=32)
    parser.add_argument("--scale", nargs="*", type=int, default=[1_000, 10_000, 100_000])
    return parser.parse_args()


def main() -> None:
    """Run, print and write the report."""
    args = arguments()
    faiss.omp_set_num_threads(1)
    documents = load_documents(args.data, args.weights)
    report: dict[str, Any] = {"weights": args.weights, "config": LearnerConfig().model_dump()}
    report["runs"] = []
    for place, novel in enumerate(args.novel):
        seed = args.seeds[place % len(args.seeds)]
        report["runs"].append(run(documents, Plan(args.requests, novel, seed), args))
        args.river_seconds = 0  # once is enough
    if args.scale:
        bundle = starting_snapshot(documents, "", args.clusters, args.seeds[0])
        plan = Plan(8_000, args.novel[0], args.seeds[0])
        rows = documents.embeddings[make_stream(documents, plan)]
        dim = bundle.dim
        report["learner_per_s"] = {
            f"calls of {b}": round(scale.learner_rate(bundle, rows, b)) for b in (1, 32, 256)
        }
        report["scale"] = [
            scale.assign_scale(k, dim, 2000 if k <= 10_000 else 300) for k in args.scale
        ]
        report["bytes_per_cluster"] = scale.memory_per_cluster(dim)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "stream.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "stream.md").write_text(markdown(report))
    plot(report["runs"][0], args.out / "stream.png")
    print(markdown(report))


if __name__ == "__main__":
    main()
