from tests.corpus.data_page import MARK, PAGE, TABLES, made


def test_the_tables_are_what_the_code_says() -> None:
    page = PAGE.read_text("utf-8")
    assert made(page) == page, "python -m tests.corpus.data_page writes the tables anew"
    for name, table in TABLES.items():
        assert MARK.format(name=name) + "\n" + table() in page
