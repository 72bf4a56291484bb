"""Table and figure of the questions: what each part brought, with its interval, and its cost."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from benchmarks import results, update_cost
from benchmarks.reproduce import training
from benchmarks.reproduce.configurations import ASKED, CONFIGURATIONS, build
from benchmarks.reproduce.questions import CENTRE, REFERENCE, REST_CENTRE, SWEEP_SEED
from benchmarks.reproduce.records import SETUP, Job, Record, Setup, job_of, loss_of, rate_of, read
from benchmarks.reproduce.schedule import losses
from benchmarks.reproduce.statistics import CONFIDENCE, half_width, noise, pooled

NAME = "questions"
PAGE = Path(__file__).parents[2] / "docs" / "what_to_set.md"
WANTED = 0.005  # half the width of an interval that decides between two defaults


class Answer(NamedTuple):
    """Holds what the pairs of one configuration and the reference say.

    Attributes:
        name: Of the configuration.
        rate: Peak learning rate of its matrices.
        differences: Of validation losses, the reference's taken away, by seed.
        half: Half the width of the mean's interval; nan where no configuration has two pairs.
    """

    name: str
    rate: float
    differences: dict[int, float]
    half: float

    @property
    def mean(self) -> float:
        """Averages over seeds."""
        return float(np.mean(list(self.differences.values())))

    @property
    def verdict(self) -> str:
        """Says what the interval lets one conclude."""
        if self.mean - self.half > 0:
            return "loses"
        if self.mean + self.half < 0:
            return "gains"
        return f"equal within {WANTED}" if abs(self.mean) + self.half <= WANTED else "not told"

    def __str__(self) -> str:
        if math.isnan(self.half):
            return f"{self.mean:+.4f} (no interval)"
        return f"{self.mean:+.4f} ± {self.half:.4f}"


def report(out: Path, update_docs: bool = False) -> None:
    """Writes `questions.json`, `.md` and `.png` beside the runs."""
    records = read(out)
    if not records:
        raise SystemExit(f"no runs in {out}")
    setup = json.loads((out / SETUP).read_text())
    steps = setup["steps"]
    found = answers(records, steps)
    summary = [first_line(found, records, steps), table(found, setup), caption(setup, records)]
    page = [*summary, noise_table(records), sweep_table(records, steps)]
    record = {
        "benchmark": NAME,
        **setup,
        "runs": len(records),
        "answers": {
            each.name: {
                "rate": float(f"{each.rate:.4g}"),
                "differences": {seed: round(value, 5) for seed, value in each.differences.items()},
                "mean": round(each.mean, 5),
                "half": None if math.isnan(each.half) else round(each.half, 5),
            }
            for each in found
        },
        "environment": records[-1]["environment"],
    }
    results.write(out, NAME, record, _joined(page), draw(found, records, steps))
    if update_docs:
        results.update_readme(f"reproduce-{NAME}", _joined(summary), PAGE)


def _joined(parts: Sequence[str]) -> str:
    return "\n\n".join(part for part in parts if part)


def answers(records: Sequence[Record], steps: int) -> list[Answer]:
    """Pairs every configuration with the reference; one without a pair is not there."""
    deviation, freedom = noise_of_a_run(records, steps)
    found = []
    for name in (name for names in ASKED for name in names):
        for collect in (runs_of, first_runs_of):
            own, reference = (collect(records, each, steps) for each in (name, REFERENCE))
            differences = {
                seed: loss_of(run) - loss_of(reference[seed])
                for seed, run in own.items()
                if seed in reference
            }
            if differences:
                rate = rate_of(next(iter(own.values()))["k"])
                half = half_width(deviation, freedom, len(differences))
                found.append(Answer(name, rate, differences, half))
                break
    return found


def noise_of_a_run(records: Sequence[Record], steps: int) -> tuple[float, int]:
    """Gives the standard deviation of one run and its degrees of freedom, from all pairs."""
    names = [REFERENCE, *(name for names in ASKED for name in names)]
    of_names = {name: runs_of(records, name, steps) for name in names}
    losses = {
        name: {seed: loss for seed, run in runs.items() if math.isfinite(loss := loss_of(run))}
        for name, runs in of_names.items()
    }
    return pooled({name: by_seed for name, by_seed in losses.items() if by_seed})


def runs_of(records: Sequence[Record], name: str, steps: int) -> dict[int, Record]:
    """Collects a configuration's runs by seed, at the rates that most of its seeds have.

    Of several such rates it is the best. The seed that rates are chosen on is left out.
    """
    at: dict[tuple[int, int], dict[int, Record]] = {}
    for run in records:
        known = run["configuration"], run["steps"], run["nudge"]
        if known == (name, steps, 0) and run["seed"] != SWEEP_SEED:
            at.setdefault((run["k"], run["rest_k"]), {})[run["seed"]] = run

    def count_and_gain(runs: dict[int, Record]) -> tuple[int, float]:
        return len(runs), -float(np.mean([loss_of(run) for run in runs.values()]))

    return dict(sorted(max(at.values(), key=count_and_gain).items())) if at else {}


def first_runs_of(records: Sequence[Record], name: str, steps: int) -> dict[int, Record]:
    """Finds a configuration's run on the seed of the sweeps, at the rate before any choice."""
    job = Job(name, CENTRE, REST_CENTRE, SWEEP_SEED, steps)
    return {run["seed"]: run for run in records if job_of(run) == job}


def first_line(found: Sequence[Answer], records: Sequence[Record], steps: int) -> str:
    """Says which differences these runs can tell."""
    apart = [max(map(loss_of, runs)) - min(map(loss_of, runs)) for runs in noise(records).values()]
    rounding = (
        f" Two runs that differ by rounding alone end {max(apart):.5f} apart." if apart else ""
    )
    deviation, freedom = noise_of_a_run(records, steps)
    if not freedom:
        start = "**These runs cannot tell differences with an interval yet**"
        return f"{start}: it takes two pairs of one configuration.{rounding}"
    counts = sorted({len(each.differences) for each in found}, reverse=True)
    told = ", ".join(
        f"{half_width(deviation, freedom, count):.4f} with {count} pair{'s' * (count > 1)}"
        for count in counts
    )
    return (
        f"**These runs tell differences beyond {told}** (95 % intervals; {WANTED} was wanted, and "
        f"six pairs would tell {half_width(deviation, freedom, 6):.4f}). Paired differences have a "
        f"standard deviation of {math.sqrt(2) * deviation:.4f}, estimated from all pairs with "
        f"{freedom} degrees of freedom.{rounding}"
    )


def title_of(name: str) -> str:
    """Names a configuration; all of ours are in Muon's scale here."""
    return CONFIGURATIONS[name].title.removesuffix(", Muon's scale")


def table(found: Sequence[Answer], setup: Mapping[str, Any]) -> str:
    """Draws one row for each question that has a pair."""
    if not found:
        return ""
    state, products = cost(REFERENCE, setup)
    rows = []
    for each in found:
        own_state, own_products = cost(each.name, setup)
        rows.append(
            [
                title_of(each.name),
                str(each),
                each.verdict,
                str(len(each.differences)),
                f"{each.rate:.2g}",
                f"{own_products / products:.2f}",
                f"{own_state / state:.2f}",
            ]
        )
    header = (
        "in place of our Muon",
        "loss minus its",
        "so it",
        "pairs",
        "learning rate",
        "products",
        "state",
    )
    return results.markdown(header, rows)


def cost(name: str, setup: Mapping[str, Any]) -> tuple[int, float]:
    """Counts the entries of the optimizer's state, and FLOPs of an update's matrix products."""
    known = Setup(**{field: setup[field] for field in Setup.__dataclass_fields__})
    model = training.GPT(training.model_of(known, known.vocab_size))
    tokens = jax.ShapeDtypeStruct((1, known.context), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    optimizer = build(CONFIGURATIONS[name], setup["steps"], 1.0, 1.0)
    state = jax.eval_shape(optimizer.init, params)
    entries = sum(leaf.size for leaf in jax.tree.leaves(state))
    return entries, update_cost.products(optimizer, params)["flops"]


def caption(setup: Mapping[str, Any], records: Sequence[Record]) -> str:
    """Says what was run."""
    tokens = setup["batch_size"] * setup["context"]
    commits = sorted({record["environment"]["commit"] for record in records})
    where = dict(records[-1]["environment"]) | {"commit": " and ".join(commits)}
    return (
        f"{len(records)} runs of {setup['steps']} steps of {tokens:,} tokens; model "
        f"`{setup['model']}`, stack 1, `polar_express`, in Muon's scale. Losses are those of the "
        f"averaged weights on {setup['eval_tokens']:,} held-out tokens, differences are paired by "
        f"seed, with Student's {CONFIDENCE:.0%} interval, for which all pairs together say how far "
        "chance moves a run; a single pair may be on the seed that rates are swept on, at the rate "
        "before the sweep. "
        f"{results.caption({'environment': where})}"
    )


def noise_table(records: Sequence[Record]) -> str:
    """Shows how far equal algorithms end from each other."""
    rows = []
    for runs in noise(records).values():
        ends = [loss_of(run) for run in runs]
        shown = ", ".join(f"{end:.5f}" for end in ends)
        rows.append([title_of(runs[0]["configuration"]), shown, f"{max(ends) - min(ends):.5f}"])
    header = "equal but for rounding", "validation losses", "apart by"
    return results.markdown(header, rows) if rows else ""


def sweeps(records: Sequence[Record], steps: int) -> dict[str, dict[int, float]]:
    """Collects, by title, the losses of the seed that rates are chosen on, by k."""
    jobs = {job_of(run) for run in records if run["seed"] == SWEEP_SEED and run["steps"] == steps}
    rest = [losses(records, "rest_k", job) for job in jobs if job.configuration == REFERENCE]
    of_rest = max(rest, key=len, default={})
    found = {"the fallback's, with our Muon": of_rest if len(of_rest) > 1 else {}}
    for name in [REFERENCE, *(name for names in ASKED for name in names)]:
        swept = [losses(records, "k", job) for job in jobs if job.configuration == name]
        found[title_of(name)] = max(swept, key=len, default={})
    return {title: swept for title, swept in found.items() if swept}


def sweep_table(records: Sequence[Record], steps: int) -> str:
    """Draws one column for each learning rate."""
    found = sweeps(records, steps)
    ks = sorted({k for swept in found.values() for k in swept})
    rows = []
    for title, swept in found.items():
        cells = {k: f"{swept[k]:.4f}" if k in swept else "" for k in ks}
        best = min(swept, key=swept.__getitem__)
        rows.append([title, *(cells | {best: f"**{cells[best]}**"}).values()])
    header = "learning rate, on another seed", *(f"{rate_of(k):.2g}" for k in ks)
    return results.markdown(header, rows) if rows else ""


def draw(found: Sequence[Answer], records: Sequence[Record], steps: int) -> Figure:
    """Draws paired differences with their intervals, each pair as a dot, and the sweeps."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    differences, rates = figure.subplots(1, 2)
    for place, each in enumerate(found):
        half = 0.0 if math.isnan(each.half) else each.half
        differences.errorbar(each.mean, -place, xerr=half, fmt="o", capsize=4, color="C0")
        values = list(each.differences.values())
        differences.plot(values, [-place] * len(values), ".", color="black", markersize=4)
    titles = [title_of(each.name) for each in found]
    differences.set_yticks([-place for place in range(len(found))], titles)
    differences.axvline(0, color="black", linewidth=0.8)
    differences.axvspan(-WANTED, WANTED, color="black", alpha=0.07)
    differences.set(xlabel="validation loss minus our Muon's, 95 % interval; dots are pairs")
    for title, swept in sweeps(records, steps).items():
        ks = [k for k in sorted(swept) if math.isfinite(swept[k])]
        rates.plot([rate_of(k) for k in ks], [swept[k] for k in ks], "o-", label=title)
    if rates.lines:
        rates.set_xscale("log")
        rates.legend()
    rates.set(xlabel="learning rate", ylabel="validation loss", title="sweeps, another seed")
    return figure
