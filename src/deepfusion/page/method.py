"""Sections on how the result came about: clusters, text, routing, training."""

from __future__ import annotations

from collections import Counter
from typing import Any

from markupsafe import Markup

from deepfusion import figures
from deepfusion.findings import RESULT, Findings
from deepfusion.labels import LISTED, METRICS, label
from deepfusion.page.parts import Section, Table, listed, percent, signed

WRITTEN_BY_DEVICES = "Devices' models wrote some of this text: it can repeat private text word for word."
EVERY_EXPERT = "No expert is dead: each serves 1 % of the tokens or more in every layer."
COUNTS = {
    "rows_read": "rows read",
    "left_out_by_where": "rows left out: not what where asks for",
    "left_out_long_answers": "rows left out: the answer is longer than max_answer_bytes",
    "left_out_over_max_rows": "rows left out: beyond max_rows",
    "left_out_test_of_no_device": "test rows left out: about what no device holds",
    "private_facts": "private facts",
    "public_facts": "public facts",
    "private": "private documents",
    "private_held": "private documents on devices; what several hold counts several times",
    "heldout": "private documents kept aside, to tell when centralised training has converged",
    "public": "public documents",
    "questions": "public questions without their answers, for devices' models to answer",
    "test": "test questions",
    "test_private": "of these, what only devices know",
}
KINDS = {
    "public": "public: the server's own text",
    "answered": "answered: public questions, answered by devices' models",
    "sampled": "sampled: written by devices' models",
}


def corpus(findings: Findings) -> Section | None:
    """What there is to learn and to be asked, and what was left out."""
    if findings.corpus is None or not findings.corpus.counts:
        return None
    counts = findings.corpus.counts
    names = [name for name in COUNTS if counts.get(name)] + [name for name in counts if name not in COUNTS]
    rows = [[COUNTS.get(name, name.replace("_", " ")), f"{counts[name]:,}"] for name in names]
    text = f"Domains: {listed(findings.corpus.domains)}."
    return Section("text", "Text", [text], tables=[Table(["what", "number"], rows)])


def clusters(findings: Findings) -> Section | None:
    """Similarity of the devices, members of the clusters, and their teachers."""
    found = findings.clusters
    if found is None:
        return None
    types = {upload.device: upload.model_type for upload in findings.uploads}
    about = {device.id: Counter(device.domains) for device in findings.corpus.devices} if findings.corpus else {}
    members: list[list[str]] = []
    for cluster, group in enumerate(found.members):
        subjects = sum((about.get(device, Counter()) for device in group), Counter[str]())
        shares = ", ".join(f"{name} {percent(n / subjects.total(), 0)} %" for name, n in subjects.most_common(3))
        kinds = Counter(types[device] for device in group if device in types)
        models = ", ".join(f"{count} × {kind}" for kind, count in sorted(kinds.items()))
        written = f"{findings.transfer.per_cluster[cluster]:,}" if findings.transfer else ""
        members.append([str(cluster), listed(group), models, shares, written])
    tables = [Table(["cluster", "devices", "models", "their documents", "texts written"], members, texts=4)]
    if findings.proxies:
        heads = ["cluster", "proxy", "mean of", "distance"]
        caption = "Distance of the farthest member's weights from the mean, relative L2; 0 where there is one member."
        taught = [
            [str(proxy.cluster), proxy.model_type, listed(proxy.members), f"{proxy.distance:.3f}"]
            for proxy in sorted(findings.proxies, key=lambda proxy: (proxy.cluster, proxy.lineage))
        ]
        tables.append(Table(heads, taught, texts=3, caption=caption))
    groups = [found.of(device) for device in found.devices]
    figure = Markup(figures.similarity(found.similarity, found.devices, groups))
    text = (
        "Cosine similarity of the devices' embeddings, which say what their texts are about: full colour is 1, none is "
        "0 or less. Devices are in the order of their clusters; a frame is a cluster, and clusters are good where "
        "colour stays inside the frames."
    )
    return Section("clusters", "Who knows what", [text], figures=[figure], tables=tables)


def transfer(findings: Findings) -> Section | None:
    """How much text of which kind, and what it may give away."""
    found = findings.transfer
    if found is None:
        return None
    notice = " ".join(found.notices) or (WRITTEN_BY_DEVICES if found.private_text_risk else "")
    names = [name for name in KINDS if name in found.counts]
    names += [name for name in found.counts if name not in KINDS]
    counts = [[KINDS.get(name, name.replace("_", " ")), f"{found.counts[name]:,}"] for name in names]
    writers = listed([f"{writer} ({number:,})" for writer, number in found.by_writer.items() if number])
    text = ["All that students learn from, and what was dropped before."]
    if writers:
        text = [f"{text[0]} Writers, and how many documents of each were kept: {writers}."]
    return Section("transfer", "Text that teaches", text, notice, tables=[Table(["documents", "number"], counts)])


def routing(findings: Findings) -> Section | None:
    """Whom the router chooses where, and what each expert is good for."""
    found = {measured.system: measured.routing for measured in findings.measured if measured.routing is not None}
    if not found:
        return None
    system, facts = (RESULT, found[RESULT]) if RESULT in found else next(iter(found.items()))
    information = facts["mutual_information"]
    by_layer = ", ".join(f"{number:.3f}" for number in information["layers"])
    dead = ", ".join(f"layer {layer} expert {expert}" for layer, expert in facts["dead"][:LISTED])
    if len(facts["dead"]) > LISTED:
        dead += f" … {len(facts['dead'])} in all of {facts['layers'] * facts['experts']}"
    alive = f"Dead, that is, of use to less than 1 % of the tokens: {dead}." if dead else EVERY_EXPERT
    text = [
        f"Router of: {label(system)}. A cell is the mean probability that the router gives an expert on a domain's "
        f"tokens. Highest on average over layers: {_favourites(facts)}.",
        "Mutual information of domain and expert (a token drawn evenly, then an expert by the token's top-k gate "
        f"weights): {information['mean']:.3f} nats on average; by layer {by_layer}. 0 would be a router that ignores "
        f"the domain. Experts' weights differ by {facts['expert_difference']['mean']:.3f} (relative L2 distance, mean "
        f"over pairs and layers). {alive}",
    ]
    load = Table(
        ["layer", *(f"expert {expert}" for expert in range(facts["experts"]))],
        [[str(layer), *(f"{share:.3f}" for share in line)] for layer, line in enumerate(facts["load"])],
        caption="Load: share of all gate weight.",
    )
    tables = [load, _removal(facts)] if facts["removal"] else [load]
    figure = Markup(figures.routing(facts["probabilities"]))
    return Section("routing", "Experts and routing", text, figures=[figure], tables=tables)


def _favourites(facts: dict[str, Any]) -> str:
    """Each domain and the expert that its tokens are sent to most, over all layers."""
    found: list[str] = []
    for domain, layers in facts["probabilities"].items():
        totals = [sum(shares) for shares in zip(*layers, strict=True)]
        found.append(f"{domain} → expert {totals.index(max(totals))}")
    return listed(found)


def _removal(facts: dict[str, Any]) -> Table:
    whole = facts["clusters"] == facts["experts"]
    without = "without expert" if whole else "without the experts of cluster"
    cells = {(cell["expert"], cell["domain"]): cell for cell in facts["removal"]}
    domains = ["all", *facts["domains"]]
    rows: list[list[str]] = []
    for expert in dict.fromkeys(expert for expert, _ in cells):
        line = [cells[expert, domain] for domain in domains]
        changes = [(signed(cell["token_accuracy"], 3), signed(cell["nats_per_token"], 3)) for cell in line]
        rows.append([str(expert), *(text for pair in changes for text in pair)])
    return Table(
        [without, *(METRICS["token_accuracy"], METRICS["token_log_perplexity"]) * len(domains)],
        rows,
        groups=[("", 1), *((domain, 2) for domain in domains)],
        caption="What changes when no token can reach an expert. One that has learned a domain is missed there and "
        "nowhere else.",
    )


def training(findings: Findings) -> Section | None:
    """Losses over steps."""
    curves = {label(name): curve for name, curve in findings.losses.items() if curve}
    if not curves:
        return None
    text = (
        "Training loss, averaged over neighbouring steps. With and without a distillation term losses do not compare: "
        "read whether each curve has come to rest, not which is lower."
    )
    return Section("training", "Training", [text], figures=[Markup(figures.losses(curves))])
