"""Code blocks of responses: ours against a Markdown parser's own reading, with the reason wherever the two differ."""

from __future__ import annotations

import pytest
from markdown_it import MarkdownIt

from aligner.reward.code_blocks import final_part, python_block

A, B = "a = 1\n", "b = 2\n"
BARE = "a block without an info string counts where none is named python"
NAME = "a name that plain equality with python, py, python3 does not know"
TAG = "CommonMark reads the tag's line as HTML, or as part of the fence"
THINK = "reasoning is no answer"
INSIDE = "the fence is content of another block"


def py(code: str, info: str = "python", fence: str = "```") -> str:
    return f"{fence}{info}\n{code}{fence}\n"


# (what, response, the program, why the parser alone reads it otherwise; nothing where it reads the same)
CASES: list[tuple[str, str, str | None, str]] = [
    # One block, and how it is fenced.
    ("plain", py(A), A, ""),
    ("prose around", f"Here:\n\n{py(A)}\nDone.", A, ""),
    ("prose right above", f"Here:\n{py(A)}Done.", A, ""),
    ("four backticks", py(A, fence="````"), A, ""),
    ("tildes", py(A, fence="~~~"), A, ""),
    ("five tildes", py(A, fence="~~~~~"), A, ""),
    ("a longer closing fence", f"```python\n{A}`````\n", A, ""),
    ("a shorter closing fence is none", f"````python\n{A}```\n````\n", A + "```\n", ""),
    ("tildes do not close backticks", f"```python\n{A}~~~\n```\n", A + "~~~\n", ""),
    ("backticks inside tildes", "~~~python\ns = '''\n```\n'''\n~~~\n", "s = '''\n```\n'''\n", ""),
    ("no final line break", f"```python\n{A}```", A, ""),
    ("never closed", f"```python\n{A}", A, ""),
    ("never closed, no line break", "```python\na = 1", "a = 1", ""),
    ("blanks behind the closing fence", f"```python\n{A}```  \t\nx", A, ""),
    ("words behind the closing fence", f"```python\n{A}``` done\n{B}```\n", f"{A}``` done\n{B}", ""),
    ("blank lines in the code", py("a = 1\n\n\nb = 2\n"), "a = 1\n\n\nb = 2\n", ""),
    ("a docstring with a fence", py('def f():\n    """\n    ```\n    x\n    ```\n    """\n'),
     'def f():\n    """\n    ```\n    x\n    ```\n    """\n', ""),
    # Line ends and indentation.
    ("CRLF", py(A + B).replace("\n", "\r\n"), A + B, ""),
    ("CRLF before only", "Here:\r\n" + py(A), A, ""),
    ("CR alone", py(A).replace("\n", "\r"), A, ""),
    ("indented by 1", f" ```python\n {A} ```\n", A, ""),
    ("indented by 3, the code too", f"   ```python\n   {A}   ```\n", A, ""),
    ("indented fence, code at the margin", f"  ```python\n{A}  ```\n", A, ""),
    ("code indented beyond its fence", f" ```python\n     {A} ```\n", f"    {A}", ""),
    ("indented by 4", f"Here:\n\n    ```python\n    {A}    ```\n", A, INSIDE),
    ("a tab before the fence", f"Here:\n\n\t```python\n\t{A}\t```\n", A, INSIDE),
    ("a bullet", f"- so:\n\n  ```python\n  {A}  ```\n", A, ""),
    ("a bullet, right below", f"- so:\n  ```python\n  {A}  ```\n", A, ""),
    ("a number", f"1. so:\n\n   ```python\n   {A}   ```\n2. x\n", A, ""),
    ("a number, one column more", f"1. so:\n\n    ```python\n    {A}    ```\n", A, ""),
    ("a bullet in a bullet", f"- x\n  - y\n\n    ```python\n    if a:\n        {A}    ```\n", f"if a:\n    {A}", ""),
    ("a fence as the bullet", f"- ```python\n  {A}  ```\n", A, ""),
    ("a quotation", f"> ```python\n> {A}> ```\n", A, ""),
    ("a list that ends before its fence closes", f"- ```python\n  {A}\nx\n", A + "\n", ""),
    # Info strings.
    ("py", py(A, "py"), A, ""),
    ("python3", py(A, "python3"), A, ""),
    ("Python", py(A, "Python"), A, ""),
    ("PYTHON3", py(A, "PYTHON3"), A, ""),
    ("a blank before it", py(A, " python"), A, ""),
    ("title", py(A, 'python title="a.py"'), A, ""),
    ("line numbers", py(A, "python {1,3-4} showLineNumbers"), A, ""),
    ("copy", py(A, "python copy"), A, ""),
    ("Python 3", py(A, "Python 3"), A, ""),
    ("py3", py(A, "py3"), A, NAME),
    ("python3.11", py(A, "python3.11"), A, NAME),
    ("ipython3", py(A, "ipython3"), A, NAME),
    ("a file name", py(A, "python:main.py"), A, NAME),
    ("a comma", py(A, "python,linenos"), A, NAME),
    ("braces", py(A, "{python}"), A, NAME),
    ("pandoc", py(A, "{.python .numberLines}"), A, NAME),
    ("knitr", py(A, "{python, echo=FALSE}"), A, NAME),
    ("language-python", py(A, "language-python"), A, NAME),
    ("a console session", py(">>> 1\n", "pycon"), None, ""),
    ("a language that begins so", py(A, "pyrex"), None, ""),
    ("no name", py(A, ""), A, BARE),
    # Which block.
    ("the last of two", py(A) + "then\n" + py(B), B, ""),
    ("three names", py("x\n", "py") + py(A, "python3") + py(B, "Python"), B, ""),
    ("bash before", "```bash\npip install x\n```\nThen:\n" + py(A), A, ""),
    ("cpp before", "```cpp\nint x;\n```\n" + py(A), A, ""),
    ("text before, never closed", "```text\nx\n" + py(A), None, ""),
    ("plain output after", py(A) + "Output:\n```\n2\n```\n", A, ""),
    ("json after", py(A) + "```json\n{}\n```\n", A, ""),
    ("bash after", py(A) + "Run:\n```sh\npython a.py\n```\n", A, ""),
    ("the last of two without a name", py(A, "") + "\n" + py(B, ""), B, BARE),
    ("no name beside another language", "```bash\nls\n```\n" + py(A, ""), A, BARE),
    ("a stray fence at the end", py(A, "") + "\n```\n", A, BARE),
    ("an empty block at the end", py(A) + "\n```python\n```\n", A, "an empty block is no program"),
    ("only another language", "```javascript\nx\n```\n", None, ""),
    ("a Markdown block around it", "````markdown\n# So\n" + py(A) + "````\n", A, INSIDE),
    ("no fence", "def f(x):\n    return x\n", None, ""),
    ("an inline span", "Use `python` and ```python x``` here.\n", None, ""),
    ("nothing", "", None, ""),
    # Tags and reasoning.
    ("answer tags", f"<answer>\n{py(A)}</answer>\n", A, TAG),
    ("answer tags on the same lines", f"<answer>```python\n{A}```</answer>\n", A, TAG),
    ("after reasoning", f"<think>\n{py(B)}\n</think>\n\n{py(A)}", A, ""),
    ("only in the reasoning", f"<think>\n\n{py(B)}\n</think>\n\nIt is 3.", None, THINK),
    ("reasoning that the template opened", f"Hm.\n\n{py(B)}\n</think>\nIt is 3.", None, THINK),
    ("reasoning that never ends", f"<think>\n\n{py(B)}", None, THINK),
    ("two thoughts", f"<think>a</think>\n\n{py(B)}\n<think>b</think>\n\n{py(A)}", A, ""),
    ("a fence left open in the reasoning", f"<think>\n\n```python\n{B}</think>\n\n{py(A)}", A, THINK),
    ("THINKING", f"<THINKING>x</THINKING>\n{py(A)}", A, ""),
    ("words before the fence", f"So: ```python\n{A}```\n", A, "CommonMark wants a fence to begin its line"),
    ("a tag and words before it", f"<answer>So: ~~~py\n{A}~~~</answer>", A, "CommonMark wants a fence to begin its line"),
    ("words before a quoted fence", py("s = '```python'\n"), "s = '```python'\n", ""),
    ("a tag within the answer", f"No <think> here.\n\n{py(A)}", A, ""),
]  # fmt: skip


def by_the_parser(text: str) -> str | None:
    """CommonMark alone: the last fence whose first word is python, py or python3."""
    found = [token for token in MarkdownIt("commonmark").parse(text) if token.type == "fence"]
    named = [token for token in found if token.info.lower().split()[:1] in (["python"], ["py"], ["python3"])]
    return named[-1].content if named else None


@pytest.mark.parametrize(("text", "program", "why"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_the_program_of_a_response(text: str, program: str | None, why: str) -> None:
    assert python_block(text) == program
    assert (by_the_parser(text) == program) == (not why), f"the parser alone: {by_the_parser(text)!r}"


def test_the_table_is_long_enough() -> None:
    assert len(CASES) >= 60 and len({case[0] for case in CASES}) == len(CASES)


def test_which_block_counts_is_a_choice() -> None:
    text = py(A) + "and\n```bash\nls\n```\n" + py(B)
    assert [python_block(text, block) for block in ("last", "first", "all")] == [B, A, A + "\n" + B]
    assert python_block("a = 1\n", "text") == "a = 1\n"
    assert python_block("<think>x</think>a = 1\n", "text") == "a = 1\n"
    assert python_block(" \n", "text") is None


def test_the_final_part() -> None:
    assert final_part("<think>a</think>b</think>c") == "c"
    assert final_part("[THINK]a[/THINK]c") == "c"
    assert final_part("plain") == "plain"
    assert final_part("  <think>a") is None
