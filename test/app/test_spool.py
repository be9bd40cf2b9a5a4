"""Results of many cases take no memory, and one by one make the file that they made together."""

import json
from pathlib import Path

from ichseg.app import results
from ichseg.app.cases import InputCase
from ichseg.app.results import CaseResult, InOrder, Spool


def test_a_result_file_is_as_json_writes_it(tmp_path):
    some = [
        CaseResult("a\nb.mha", "a.mha", "", {"x": [1, 2.5], "y": {"z": "\u00e9\n "}, "e": []}),
        CaseResult("b.mha", None, "why", {}),
    ]
    for chosen in (some, some[:1], []):
        results.write_results(chosen, tmp_path / "results.json")
        text = (tmp_path / "results.json").read_text()
        assert text == json.dumps(json.loads(text), indent=1) + "\n"
        assert len(json.loads(text)) == len(chosen)


def test_the_spool_keeps_the_latest_result_of_each_case(monkeypatch):
    monkeypatch.setattr(results, "_IN_MEMORY", 100)  # beyond this it is on disk
    spool = Spool()
    cases = [InputCase(str(n), Path(str(n)), Path("out") / str(n)) for n in range(50)]
    for number, case in enumerate(cases):
        spool[case] = CaseResult(case.name, case.name, "", {"number": number})
    spool[cases[7]] = CaseResult("7", None, "gone", {})
    del spool[cases[9]]
    assert len(spool) == 49
    assert cases[9] not in spool
    assert spool[cases[8]].report == {"number": 8}
    assert spool[cases[7]].error == "gone"
    ordered = InOrder(list(reversed(cases)), spool)
    assert [result.image for result in ordered][:3] == ["49", "48", "47"]
    assert [result.image for result in ordered[-2:]] == ["1", "0"]
    assert len(ordered) == 49
