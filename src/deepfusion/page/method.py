"""Sections on how the result came about: clusters, text, routing, training."""

from __future__ import annotations

from collections import Counter
from typing import Any

from markupsafe import Markup

from deepfusion import figures
from deepfusion.findings import RESULT, Findings
from deepfusion.page.parts import Section, Table, label, listed, percent, signed

WRITTEN_BY_DEVICES = "Devices' models wrote some of this text: it can repeat private text word for word."
EVERY_EXPERT = "No expert is dead: each serves 1 % of the tokens or more in every layer."


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
        heads, caption = ["cluster", "proxy", "mean of", "distance"], "Distance: relative L2, of the farthest member."
        taught = [
            [str(proxy.cluster), proxy.model_type, listed(proxy.members), f"{proxy.distance:.3f}"]
            for proxy in sorted(findings.proxies, key=lambda proxy: (proxy.cluster, proxy.lineage))
        ]
        tables.append(Table(heads, taught, texts=3, caption=caption))
    groups = [found.of(device) for device in found.devices]
    figure = Markup(figures.similarity(found.similarity, found.devices, groups))
    text = "Cosine similarity of the devices' embeddings: the stronger the more alike. A frame is a cluster."
    return Section("clusters", "Who knows what", [text], figures=[figure], tables=tables)


def transfer(findings: Findings) -> Section | None:
    """How much text of which kind, and what it may give away."""
    found = findings.transfer
    if found is None:
        return None
    notice = " ".join(found.notices) or (WRITTEN_BY_DEVICES if found.private_text_risk else "")
    counts = [[name.replace("_", " "), f"{number:,}"] for name, number in found.counts.items()]
    writers = listed([f"{writer} ({number:,})" for writer, number in found.by_writer.items() if number])
    text = [f"Writers, and how many texts each wrote: {writers}."] if writers else []
    return Section("transfer", "Text that teaches", text, notice, tables=[Table(["documents", "number"], counts)])


def routing(findings: Findings) -> Section | None:
    """Whom the router chooses where, and what each expert is good for."""
    found = {measured.system: measured.routing for measured in findings.measured if measured.routing is not None}
    if not found:
        return None
    system, facts = (RESULT, found[RESULT]) if RESULT in found else next(iter(found.items()))
    information = facts["mutual_information"]
    by_layer = ", ".join(f"{number:.3f}" for number in information["layers"])
    dead = ", ".join(f"layer {layer} expert {expert}" for layer, expert in facts["dead"])
    text = [
        f"Router of: {label(system)}. A cell is the mean probability that the router gives an expert on a domain's "
        "tokens. Mutual information of domain and expert (a token drawn evenly, then an expert by the token's top-k "
        f"gate weights): {information['mean']:.3f} nats on average; by layer {by_layer}.",
        f"Experts' weights differ by {facts['expert_difference']['mean']:.3f} (relative L2 distance, mean over pairs "
        f"and layers). {f'Dead, that is, of use to less than 1 % of the tokens: {dead}.' if dead else EVERY_EXPERT}",
    ]
    load = Table(
        ["layer", *(f"expert {expert}" for expert in range(facts["experts"]))],
        [[str(layer), *(percent(share) for share in line)] for layer, line in enumerate(facts["load"])],
        caption="Load: share of all gate weight, %.",
    )
    tables = [load, _removal(facts)] if facts["removal"] else [load]
    figure = Markup(figures.routing(facts["probabilities"]))
    return Section("routing", "Experts and routing", text, figures=[figure], tables=tables)


def _removal(facts: dict[str, Any]) -> Table:
    cells = {(cell["expert"], cell["domain"]): cell for cell in facts["removal"]}
    domains = ["all", *facts["domains"]]
    rows: list[list[str]] = []
    for expert in range(facts["experts"]):
        line = [cells[expert, domain] for domain in domains]
        changes = [(signed(100 * cell["token_accuracy"], 1), signed(cell["nats_per_token"], 3)) for cell in line]
        rows.append([str(expert), *(text for pair in changes for text in pair)])
    return Table(
        ["without expert", *("accuracy", "nats") * len(domains)],
        rows,
        groups=[("", 1), *((domain, 2) for domain in domains)],
        caption="What changes when no token can reach an expert: accuracy in points, and nats per answer token.",
    )


def training(findings: Findings) -> Section | None:
    """Losses over steps."""
    curves = {name: curve for name, curve in findings.losses.items() if curve}
    if not curves:
        return None
    text = "Training loss, averaged over neighbouring steps; with and without a distillation term they do not compare."
    return Section("training", "Training", [text], figures=[Markup(figures.losses(curves))])
