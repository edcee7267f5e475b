"""Groups of a table's rows, by name and by number."""

import pandas as pd

from lminf_eval.report.frames import group_by_name, group_by_number


def test_groups_ascend_and_hold_all_of_their_rows():
    table = pd.DataFrame({"method": ["b", "a", "b"], "length": [4096.0, 2048.0, 2048.0]})
    assert [(name, list(rows.index)) for name, rows in group_by_name(table, "method")] == [("a", [1]), ("b", [0, 2])]
    by_length = [(number, list(rows.index)) for number, rows in group_by_number(table, "length")]
    assert by_length == [(2048, [1, 2]), (4096, [0])]
