"""From data files to records, and from records to token ids."""

import json

import numpy as np
import pytest

from keras_vaultgemma.data.text_files import TextRecords, read_records

pytestmark = pytest.mark.any_backend


CHAT = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def test_texts_end_at_blank_lines(write):
    path = write("a.txt", "\ufeffOne fox,\nred.\n\nA hare\r\n \t\r\n\r\n  indented, 한국\n\n\n")
    assert read_records(path) == TextRecords(["One fox,\nred.", "A hare", "  indented, 한국"], None)


def test_a_text_a_line_where_no_line_is_blank(write):
    assert read_records(write("a.txt", "One fox,\r\n a hare\nA wolf\n\n")).texts == [
        "One fox,",
        " a hare",
        "A wolf",
    ]


def test_arrays_and_tables_with_tabs(write):
    records = [{"text": "a, b"}, {"text": 'c "d"', "id": 3}]
    expected = TextRecords(["a, b", 'c "d"'], None)
    assert read_records(write("a.json", json.dumps(records, indent=1))) == expected
    assert read_records(write("b.json", json.dumps(expected.texts))) == expected
    assert read_records(write("c.json", lines(*records))) == expected
    assert read_records(write("d.TSV", 'id\ttext\n1\ta, b\n2\t"c ""d"""\n')) == expected


def test_chats(write):
    """Rows of TRL: messages, or a prompt and a completion that are strings or messages."""
    windows = [{**message, "content": f"{message['content']}\r\n"} for message in CHAT]
    unix = [{**message, "content": f"{message['content']}\n"} for message in CHAT]
    found = read_records(
        write("a.jsonl", lines({"messages": windows, "id": 1}, {"messages": CHAT}))
    )
    assert found == TextRecords([unix, CHAT], None) and found.samples == [unix, CHAT]
    found = read_records(write("b.jsonl", lines({"prompt": CHAT[:1], "completion": CHAT[1:]})))
    assert found == TextRecords([CHAT[1:]], [CHAT[:1]])
    found = read_records(write("c.jsonl", lines({"prompt": "Who?", "completion": "I."})))
    assert found == TextRecords(["I."], ["Who?"])
    found = read_records(write("d.jsonl", lines({"talk": CHAT})), text_column="talk")
    assert found == TextRecords([CHAT], None)


@pytest.mark.parametrize("kind", ["rows", "columns", "frame", "Dataset", "stream"])
def test_tables_in_memory(kind):
    rows = [{"text": f"t{i}", "note": f"n{i}", "id": i} for i in range(3)] + [
        {"text": " ", "note": "x", "id": 9}
    ]
    if kind == "frame":
        data = pytest.importorskip("pandas").DataFrame(rows)
    elif kind == "Dataset":
        data = pytest.importorskip("datasets").Dataset.from_list(rows)
    elif kind == "columns":
        data = {name: [row[name] for row in rows] for name in rows[0]}
    else:
        data = rows if kind == "rows" else iter(rows)
    found = read_records(data, group_column="id")
    assert found == TextRecords(["t0", "t1", "t2"], None, 1, ["0", "1", "2"])
    if kind != "stream":
        found = read_records(data, prompt_column="text", response_column="note")
        assert found.texts == ["n0", "n1", "n2", "x"] and found.prompts[1] == "t1"


@pytest.mark.parametrize(
    "data, columns, message",
    [
        ([], {}, "The data must have at least one record"),
        (["a", None], {}, "The data, row 1: 'text' must be a string. Received: None"),
        ([{"note": "a"}], {}, r"must have a column 'text'.*columns \['note'\]"),
        ([{"note": "a"}], {"text_column": "txt"}, r"row 0: there is no column 'txt'.*\['note'\]"),
        ([("a", "b")], {}, "Pairs must be"),
        (iter([("a", "b")]), {}, "Pairs must be"),
        (3, {}, "row 0: 'text' must be a string. Received: 3"),
        ([b"a", b"\xff"], {}, r"row 1: 'text' must be a string. Received: b'\\xff'"),
    ],
)
def test_bad_tables(data, columns, message):
    with pytest.raises(ValueError, match=message):
        read_records(data, **columns)


def test_texts_and_chats_in_memory():
    texts = ["a", "b"]
    data_of_bytes = np.array([text.encode() for text in texts])
    for data in (texts, np.array(texts), data_of_bytes, iter(texts), iter([texts])):
        assert read_records(data) == TextRecords(texts, None)
    assert read_records([CHAT, CHAT]) == TextRecords([CHAT, CHAT], None)
    pairs = {"prompts": texts, "responses": ["c", "d"]}
    assert read_records(pairs) == TextRecords(["c", "d"], texts)


def test_columns_of_a_table(write):
    path = write(
        "a.csv", '\ufeffid,text,note\r\n1,"a, b",x\r\n2,"line\r\nbreak ""q""",y\r\n3, ,z\r\n'
    )
    assert read_records(path) == TextRecords(["a, b", 'line\nbreak "q"'], None, blank=1)
    assert read_records(path, text_column="note") == TextRecords(["x", "y", "z"], None)
    pairs = read_records(path, prompt_column="note", response_column="text")
    assert pairs == TextRecords(["a, b", 'line\nbreak "q"'], ["x", "y"], blank=1)


def test_json_lines(write):
    path = write(
        "a.jsonl",
        lines({"prompt": "Who?", "response": "A\r\n\nB"})
        + "\n"
        + lines({"prompt": "", "response": "C"}),
    )
    assert read_records(path) == TextRecords(["A\n\nB", "C"], ["Who?", ""])
    assert read_records(path, text_column="response") == TextRecords(["A\n\nB", "C"], None)
    assert read_records(path, prompt_column="response", response_column="prompt").texts == ["Who?"]


def test_one_named_column_of_a_pair_leaves_the_other_its_name(write):
    path = write("a.jsonl", lines({"question": "Who?", "response": "I.", "text": "no"}))
    assert read_records(path, prompt_column="question") == TextRecords(["I."], ["Who?"])
    path = write("a.jsonl", lines({"prompt": "Who?", "answer": "I."}))
    assert read_records(path, response_column="answer") == TextRecords(["I."], ["Who?"])


def test_very_long_values(write):
    assert len(read_records(write("a.csv", f"text\n{'a' * 200_000}\n")).texts[0]) == 200_000


@pytest.mark.parametrize(
    "name, content, columns, message",
    [
        (
            "a.parquet",
            "x",
            {},
            r"must be a file named \.txt, \.jsonl, .*\.tsv, or a table .*read_parquet.* Received: .*a\.parquet",
        ),
        ("a.txt", " \n\n\t\n", {}, r"a\.txt must have at least one record\. Received: none"),
        ("a.csv", "", {}, "at least one record. Received: none"),
        ("a.csv", "text\n", {}, "at least one record. Received: none"),
        ("a.jsonl", "\n", {}, "at least one record. Received: none"),
        (
            "a.csv",
            "text\n \n\t\n",
            {},
            "a record whose 'text' is not blank. Received: 2 blank records",
        ),
        ("a.txt", "x", {"text_column": "text"}, r"a\.txt has no columns; .* Received: \['text'\]"),
        (
            "a.csv",
            "id,note\n1,x\n",
            {},
            r"must have a column 'text', or 'prompt' and 'response'.*columns \['id', 'note'\]",
        ),
        (
            "a.csv",
            "id,note\n1,x\n",
            {"text_column": "txt"},
            r"line 2: there is no column 'txt'. .* \['id', 'note'\]",
        ),
        (
            "a.jsonl",
            lines({"text": "x"}, {"b": "y"}),
            {},
            r"line 2: there is no column 'text'. .*columns \['b'\]",
        ),
        (
            "a.jsonl",
            lines({"text": "x"}, {"text": 3}),
            {},
            "line 2: 'text' must be a string. Received: 3",
        ),
        (
            "a.txt",
            "x",
            {"group_column": "id"},
            r"a\.txt has no columns; .* Received: \['id'\]",
        ),
        (
            "a.csv",
            "text,id\nx,1\ny, \n",
            {"group_column": "id"},
            "line 3: 'id' must be a string or an integer that is not blank.* Received: ' '",
        ),
        *(
            (
                "a.jsonl",
                lines({"text": "x", "id": 1}, {"text": "y", **label}),
                {"group_column": "id"},
                f"line 2: .*{message}",
            )
            for label, message in (
                ({}, "there is no column 'id'"),
                ({"id": None}, "Received: None"),
                ({"id": 1.5}, "Received: 1.5"),
                ({"id": True}, "Received: True"),
            )
        ),
        ("a.jsonl", lines({"text": None}), {}, "line 1: 'text' must be a string. Received: None"),
        ("a.jsonl", '{"text": "x"}\n{"text"', {}, "line 2: not JSON"),
        ("a.jsonl", "[" * 100_000, {}, "line 1: not JSON"),
        ("a.jsonl", '["x"]\n', {}, r'line 1: must be an object. Received: \["x"\]'),
        ("a.csv", 'text,b\nx,y\n"x,y\n', {}, "not CSV"),
        ("a.csv", "text,b\nx\n", {}, "line 2: must have 2 values, like the header"),
        ("a.csv", "text,b\nx,y,z\n", {}, "line 2: must have 2 values, like the header"),
        ("a.json", '[{"text": "x"}, 3]', {}, "record 2: must be an object. Received: 3"),
        ("a.json", '{"text": ["x"]}', {}, r'an array of objects .* Received: \{"text"'),
        ("a.json", '[{"text"', {}, r"a\.json: not JSON"),
        ("a.json", "[" * 100_000, {}, r"a\.json: not JSON"),
        ("a.json", '[{"text": null}]', {}, "record 1: 'text' must be a string. Received: None"),
        ("a.tsv", "text\tb\nx\n", {}, "line 2: must have 2 values, like the header"),
        (
            "a.jsonl",
            lines({"messages": CHAT}, {"messages": CHAT[:1]}),
            {},
            "line 2: A chat must have an answer",
        ),
        ("a.jsonl", lines({"messages": "x"}), {}, "line 1: 'messages' must be a list of messages"),
        ("a.jsonl", lines({"text": "x"}, {"text": CHAT}), {}, "line 2: 'text' must be of one kind"),
        ("a.txt", b"\xff\xfe", {}, r"a\.txt must be text in UTF-8"),
        ("a.csv", b"text\n\xff\n", {}, r"a\.csv must be text in UTF-8"),
        (
            "a.csv",
            "a,b\nx,y\n",
            {"text_column": "a", "prompt_column": "b"},
            "one column of texts, or two columns",
        ),
    ],
)
def test_bad_files(write, name, content, columns, message):
    with pytest.raises(ValueError, match=message):
        read_records(write(name, content), **columns)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_records(tmp_path / "a.txt")


def test_labels_of_users(write):
    """As text, of the records that are not blank."""
    content = lines(
        {"text": "x", "id": 7},
        {"text": " ", "id": 8},
        {"text": "y", "id": " 7"},
        {"text": "z", "id": "b"},
    )
    records = read_records(write("a.jsonl", content), group_column="id")
    assert (records.texts, records.groups, records.blank) == (["x", "y", "z"], ["7", "7", "b"], 1)


def test_all_records_of_every_tenth_user_are_held_out():
    texts, users = [f"t{i}" for i in range(60)], [f"u{i % 20}" for i in range(60)]
    training, held_out = TextRecords(texts, None, groups=users).split()
    assert held_out.texts == ["t5", "t15", "t25", "t35", "t45", "t55"]
    assert {*held_out.groups} == {"u5", "u15"} and not {*held_out.groups} & {*training.groups}
    assert len(training.groups) == len(training.texts) == 54
    with pytest.raises(ValueError, match="at least 2 users.* Received: 1 user"):
        TextRecords(["a", "b"], None, groups=["u", "u"]).split()


def test_every_tenth_record_is_held_out():
    texts, prompts = [f"t{i}" for i in range(30)], [f"p{i}" for i in range(30)]
    training, held_out = TextRecords(texts, prompts).split()
    assert held_out == TextRecords(["t5", "t15", "t25"], ["p5", "p15", "p25"])
    assert training.texts == [t for t in texts if t not in held_out.texts]
    assert [p[1:] for p in training.prompts] == [t[1:] for t in training.texts]
    assert [len(part.texts) for part in TextRecords(texts[:2], None).split()] == [1, 1]
    assert [len(part.texts) for part in TextRecords(texts * 100, None).split()] == [2900, 100]
    with pytest.raises(ValueError, match="at least 2 records.* Received: 1 record"):
        TextRecords(["a"], None).split()


def test_packed_texts_fill_rows_in_order(tiny):
    texts = ["The fox.", "A much longer tale of a hare and a tortoise."] * 40
    preprocessor = type(tiny.preprocessor)(tiny.preprocessor.tokenizer, sequence_length=16)
    data = TextRecords(texts, None).tokenize(preprocessor, packed=True)
    token_ids, segments = data["x"]["token_ids"], data["x"]["padding_mask"]
    assert token_ids.shape == segments.shape == data["y"].shape == data["sample_weight"].shape
    assert (segments[:-1] > 0).all() and segments.max() > 1
    expected = [i for text in texts for i in [2, *preprocessor.tokenizer.tokenize([text])[0], 1]]
    assert token_ids[segments > 0].tolist() == expected


def test_a_row_for_each_text_and_for_each_pair(tiny):
    texts, prompts = ["The fox.", "The hare."], ["Who?", "Who else?"]
    for prompts_or_none, raw in (
        (None, texts),
        (prompts, {"prompts": prompts, "responses": texts}),
    ):
        data = TextRecords(texts, prompts_or_none).tokenize(
            tiny.preprocessor, packed=prompts_or_none is not None
        )
        x, y, weight = tiny.preprocessor(raw)
        np.testing.assert_array_equal(data["x"]["token_ids"], x["token_ids"])
        np.testing.assert_array_equal(data["y"], y)
        np.testing.assert_array_equal(data["sample_weight"], weight)


def test_truncated_rows_are_counted(tiny):
    preprocessor = type(tiny.preprocessor)(tiny.preprocessor.tokenizer, sequence_length=8)
    texts = ["The fox.", "A much longer tale of a hare and a tortoise."]
    with pytest.warns(
        UserWarning, match="1 of 2 rows were longer than sequence_length=8 and were truncated"
    ):
        TextRecords(texts, None).tokenize(preprocessor, packed=False)
