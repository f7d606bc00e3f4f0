"""The page: what stands on it, and that nothing breaks out of it or has to be loaded."""

import random
import re
from pathlib import Path

import pytest

from deepfusion.artifacts import Packing, Rejection
from deepfusion.findings import Findings, Measured
from deepfusion.page import costs, quality, sections, summary, tiles
from deepfusion.page.parts import Table
from deepfusion.phases.report import report
from deepfusion.pipeline import STEPS
from found import DEVICES, EVIL, Page, findings, scored


def page(found: Findings, into: Path) -> tuple[Page, str]:
    """The page as a browser sees it, and its source."""
    text = report(found, into=into).page.read_text(encoding="utf-8")
    return Page(text), text


def column(table: Table, head: str) -> dict[str, str]:
    """The first column with this head, by system."""
    place = list(table.heads).index(head)
    return {row[0]: row[place] for row in table.rows}


def marked(table: Table, place: int) -> set[str]:
    """The systems that have the mark of the best in a column."""
    return {table.rows[row][0] for row, column in table.best if column == place}


def measured(**correct: int) -> Findings:
    """Systems that get so many of twelve questions right, and are otherwise alike."""
    template = scored(1.0, random.Random(0))[:12]
    rows = {
        system: [
            row.model_copy(update={"correct_tokens": 4 * (i < n), "private": True}) for i, row in enumerate(template)
        ]
        for system, n in correct.items()
    }
    return Findings("tiny", 0, {"name": "tiny"}, "", [Measured(system, answers) for system, answers in rows.items()])


def test_it_stands_alone_and_has_every_section(tmp_path: Path) -> None:
    seen, text = page(findings(tmp_path, DEVICES), tmp_path)
    assert seen.stack == []
    assert len(seen.ids) == len(set(seen.ids))
    assert {
        *(
            "results",
            "stages",
            "domains",
            "text",
            "clusters",
            "transfer",
            "routing",
            "training",
            "compute",
            "traffic",
            "time",
        ),
        *("remarks", "recipe"),
    } <= set(seen.ids)
    assert seen.tags.count("svg") == 5
    assert all(load.startswith(("#", "data:")) for load in seen.loads)
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    assert not re.search(r"#01020[3-7]", text), "a colour's stand-in was left in a figure"
    words = " ".join(seen.text)
    assert "word for word" in words
    assert "Left out: d99: its config.json is not JSON" in words
    assert "cluster 2 has members that are unlike each other" in words
    assert "path: größe" in words


def test_names_cannot_break_out(tmp_path: Path) -> None:
    seen, _ = page(findings(tmp_path, [EVIL, *DEVICES[1:]]), tmp_path)
    assert seen.stack == []
    assert "script" not in seen.tags
    assert EVIL in "".join(seen.text)


def test_a_run_with_little_to_tell(tmp_path: Path) -> None:
    rows = [row.model_copy(update={"private": False}) for row in scored(0.5, random.Random(0))]
    seen, _ = page(Findings("tiny", 0, {"name": "tiny"}, "", [Measured("base", rows)], versions={}), tmp_path)
    assert {"results", "remarks", "recipe"} <= set(seen.ids)
    assert not {"clusters", "routing", "training", "compute", "traffic", "time"} & set(seen.ids)


# ── the first screen ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_result_is_told_beside_its_controls() -> None:
    found = measured(base=1, deepfusion=9, pooled_text_dense=6, dense_kd=10, centralized=12)
    lead, beside = summary(found, found.rows())
    assert lead == (
        "On 12 test questions that only devices can answer it predicts 75.0 % of the answers' tokens, "
        "the base model 8.3 %."
    )
    assert (
        "at the same server compute, pooled text (dense) predicts 50.0 % and distillation (dense) predicts 83.3 %."
        in beside
    )
    assert "With all private text in one place, centralised training predicts 100.0 %." in beside
    shown = tiles(found, found.rows())
    assert shown[0] == ("0.750", "token accuracy on what only devices know")
    assert shown[1] == ("−0.083", "against the best control, distillation (dense)")


def test_a_run_without_controls_says_so() -> None:
    found = measured(deepfusion=9)
    assert "No control was trained" in summary(found, found.rows())[1]
    assert "against" not in " ".join(label for _, label in tiles(found, found.rows()))


def test_a_result_of_nothing_is_shown_too() -> None:
    found = measured(deepfusion=0, dense_kd=3)
    assert tiles(found, found.rows())[0][0] == "0.000"


def test_one_is_one(tmp_path: Path) -> None:
    many = findings(tmp_path, DEVICES)
    assert many.clusters is not None
    one = findings(
        tmp_path, DEVICES, uploads=many.uploads[:1], intake=None, clusters=many.clusters.model_copy(update={"k": 1})
    )
    assert summary(one, one.rows())[0].startswith("1 device with models of type gpt2, in 1 cluster by what they know,")
    assert tiles(one, one.rows())[-1] == ("507.8 KiB", "sent by 1 device, once")


# ── tables ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_subset_of_every_system_stands_beside_what_it_cost(tmp_path: Path) -> None:
    found = findings(tmp_path, DEVICES)
    [table] = quality.results(found, found.rows()).tables
    assert [label for label, _ in table.groups if label] == [
        "what only devices know",
        "what is public",
        "all questions",
    ]
    assert list(table.heads[1:4]) == ["token accuracy", "log-perplexity", "choice accuracy"]
    assert all(cell != "–" for row in table.rows for cell in row[:10])
    cost = column(table, "server compute")
    # The run took 5e9 to write, 9.6e11, 1.2e11 and 1.2e11 to train: 1.205e12 in all.
    assert cost["joint student"] == "0.80"
    assert (cost["DeepFusion MoE"], cost["pooled text (MoE)"], cost["centralised training"]) == ("1.00", "1.00", "1.99")
    assert cost["base model"] == cost["proxies (ensemble)"] == ""
    above = {table.rows[row][0]: text for row, text in table.headings.items()}
    assert above["pooled text (MoE)"] == "controls: the same text, the same server compute"
    assert above["centralised training"].startswith("upper bound: all private text in one place")


def test_equal_best_ones_share_the_mark() -> None:
    found = measured(base=1, deepfusion=9, dense_kd=9, centralized=12)
    [table] = quality.results(found, found.rows()).tables
    assert marked(table, 1) == {"DeepFusion MoE", "distillation (dense)"}


def test_nobody_is_best_where_all_are_equal() -> None:
    found = measured(base=9, deepfusion=9, dense_kd=9, centralized=12)
    [table] = quality.results(found, found.rows()).tables
    assert table.best == frozenset()


def test_less_is_better_of_log_perplexity(tmp_path: Path) -> None:
    found = findings(tmp_path, DEVICES)
    [table] = quality.results(found, found.rows()).tables
    assert marked(table, 2) == {"DeepFusion MoE"}


def test_the_gap_is_shown_where_it_is_known() -> None:
    both, one = measured(base=0, deepfusion=9, centralized=12), measured(base=0, deepfusion=9)
    [table] = quality.results(both, both.rows()).tables
    assert column(table, "gap closed") == {
        "base model": "0.00",
        "DeepFusion MoE": "0.75",
        "centralised training": "1.00",
    }
    none = measured(base=9, deepfusion=9, centralized=9)
    assert "gap closed" not in quality.results(one, one.rows()).tables[0].heads
    assert "gap closed" not in quality.results(none, none.rows()).tables[0].heads


@pytest.mark.parametrize(("down", "told"), [({}, False), ({"d00": 2048}, True)])
def test_what_devices_were_sent_is_told_if_anything_was(tmp_path: Path, down: dict[str, int], told: bool) -> None:
    section = costs.traffic(findings(tmp_path, DEVICES, bytes_down=down))
    assert section is not None
    assert ("They were sent 2.0 KiB." in section.text[0]) == told
    assert "0 B" not in section.text[0]


def test_every_device_says_how_it_trained_and_what_that_took(tmp_path: Path) -> None:
    section = costs.traffic(findings(tmp_path, DEVICES))
    assert section is not None
    table, baselines = section.tables
    assert baselines.rows[1:] == [
        ["FedAvg (dense)", "5", "85.8 MiB", "76.3 MiB"],
        ["Branch-Train-MiX", "1", "17.2 MiB", "15.3 MiB"],
    ]
    assert baselines.rows[0][:3] == ["DeepFusion MoE", "1", "15.6 KiB"]
    assert column(table, "method")["d01"] == "lora"
    assert column(table, "trained")["d01"] == "4,000"
    assert column(table, "peak memory") == {device: "192.0 MiB" if device != "d00" else "" for device in DEVICES}
    assert column(table, "before")["d15"] == "128.0 MiB"


def test_what_packing_loses_is_told(tmp_path: Path) -> None:
    """Of those that packed; without any there is no such column."""
    found = findings(tmp_path, DEVICES)
    packing = Packing(codec="int8 delta", error=0.0002, lost=0.0123)
    one = found.uploads[0].model_copy(update={"sends": "packed", "packing": packing})
    section = costs.traffic(findings(tmp_path, DEVICES, uploads=[one, *found.uploads[1:]]))
    assert section is not None
    sends, lost = column(section.tables[0], "sends"), column(section.tables[0], "lost, %")
    assert (sends["d00"], lost["d00"]) == ("int8 delta", "1.23")
    assert (sends["d01"], lost["d01"]) == ("model", "")
    section = costs.traffic(found)
    assert section is not None
    assert "lost, %" not in section.tables[0].heads


def test_times_are_those_of_the_run_that_did_the_work(tmp_path: Path) -> None:
    """Sixteen devices of 12 seconds, the first of which a run before had trained."""
    section = costs.time(findings(tmp_path, DEVICES))
    assert section is not None
    [table] = section.tables
    assert column(table, "seconds")["device"] == "192.0"
    assert not any("done" in head for head in table.heads)
    assert "of the run that did the work" in section.text[0]


def test_what_was_left_out_of_the_text_is_counted(tmp_path: Path) -> None:
    found = findings(tmp_path, DEVICES)
    [section] = [section for section in sections(found, found.rows()) if section.anchor == "text"]
    assert list(section.tables[0].rows) == [
        ["rows read", "700"],
        ["rows left out: the answer is longer than max_answer_bytes", "12"],
        ["test questions", "160"],
    ]


def test_every_phase_is_explained() -> None:
    assert set(costs.PHASES) == set(STEPS) - {"report"}


def test_who_was_left_out_is_named_once(tmp_path: Path) -> None:
    many = findings(tmp_path, DEVICES)
    assert many.intake is not None
    rejected = (Rejection(device="d7", reason="device d7: its name is not usable as a file name"),)
    found = findings(tmp_path, DEVICES, intake=many.intake.model_copy(update={"rejected": rejected}))
    assert costs.remarks(found).items[0] == "Left out: device d7: its name is not usable as a file name"


def test_what_is_no_number_is_a_dash_and_a_warning(tmp_path: Path) -> None:
    rows = [row.model_copy(update={"answer_nats": float("nan")}) for row in scored(0.5, random.Random(0))]
    found = findings(tmp_path, DEVICES)
    broken = [m if m.system != "dense_kd" else Measured("dense_kd", rows) for m in found.measured]
    found = findings(tmp_path, DEVICES, measured=broken)
    [table] = quality.results(found, found.rows()).tables
    assert column(table, "log-perplexity")["distillation (dense)"] == "–"
    assert marked(table, 2) == {"DeepFusion MoE"}
    assert any(item.startswith("dense_kd has no finite log-perplexity") for item in costs.remarks(found).items)
    assert Page(" ".join(text for section in sections(found, found.rows()) for text in section.figures)).stack == []


def test_the_routing_figure_is_put_into_words(tmp_path: Path) -> None:
    found = findings(tmp_path, DEVICES)
    [text] = [section.text[0] for section in sections(found, found.rows()) if section.anchor == "routing"]
    assert "finance → expert 0, law → expert 1, medicine → expert 2, travel → expert 3" in text
