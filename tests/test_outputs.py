"""What tells a file of results that this tool wrote from a user's own of the same name."""

import pytest
from support import tiny

from tvaprune.outputs import PAGE_NAME, PLAN_NAME, check_replaced, drop, wrote


def test_a_folder_by_the_name_of_one_of_ours_is_the_users(tmp_path):
    (tmp_path / PLAN_NAME).mkdir()
    with tiny.refused(f"--output {tmp_path}: holds {PLAN_NAME}, which this tool did not write"):
        check_replaced("output", tmp_path, [PLAN_NAME])


def test_what_is_not_there_is_in_nobodys_way(tmp_path):
    check_replaced("output", tmp_path, [PLAN_NAME, PAGE_NAME])


def test_a_page_is_ours_under_any_name(tmp_path):
    page, other = tmp_path / "mine.html", tmp_path / "yours.html"
    page.write_text('<meta name="generator" content="tvaprune">')
    other.write_text("<h1>mine</h1>")
    assert wrote(page, PAGE_NAME) and not wrote(other, PAGE_NAME)


@pytest.mark.parametrize(("content", "stays"), [('{"dim_multiple": 8}', False), ('{"sketch": "of my own"}', True)])
def test_what_is_dropped_was_ours(content, stays, tmp_path):
    (tmp_path / PLAN_NAME).write_text(content)
    drop(tmp_path, [PLAN_NAME, PAGE_NAME])
    assert (tmp_path / PLAN_NAME).exists() == stays
