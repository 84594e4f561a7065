"""What tests do with a program's objects, across two sandboxes: the same as in one process."""

from __future__ import annotations

import textwrap

import pytest

from aligner.reward.programs import code_tests
from aligner.reward.sandbox import isolation_problem

pytestmark = pytest.mark.skipif(
    isolation_problem("namespaces") is not None, reason=f"no namespaces: {isolation_problem('namespaces')}"
)
# what -> (the program, the tests); in one process each passes, which is tested too
CASES = {
    "values": (
        """
        import datetime
        from collections import Counter, OrderedDict, defaultdict, deque
        from decimal import Decimal
        from fractions import Fraction
        def same(x): return x
        def huge(n): return 3 ** n
        def cycle():
            a = [1]
            a.append(a)
            return a
        def day(d): return d + datetime.timedelta(days=1)
        """,
        """
        import datetime, math
        from collections import Counter, OrderedDict, defaultdict, deque
        from decimal import Decimal
        from fractions import Fraction
        for x in (None, True, 1, 1.5, "a\\ud800\\u00e9", b"a\\xff", (1, (2,)), [1, [2]], {1: "a", (1, 2): [3]}, {1, 2}, 1j, range(3),
                  frozenset([1]), Decimal("1.10"), Fraction(1, 3), deque([1], 3), Counter("aab"), OrderedDict(a=1),
                  defaultdict(list, a=[1]), bytearray(b"a"), float("inf"), -0.0, ..., int, ValueError, slice(1, 2)):
            assert same(x) == x and type(same(x)) is type(x), x
        assert same(True) is True and same(None) is None and math.isnan(same(float("nan")))
        assert same(deque([1], 3)).maxlen == 3 and same(defaultdict(list))["x"] == []
        assert huge(20000) == 3 ** 20000
        assert cycle()[1][1][0] == 1
        assert day(datetime.date(2020, 2, 28)) == datetime.date(2020, 2, 29)
        assert same("x" * 300000) == "x" * 300000 and same(list(range(100000))) == list(range(100000))
        """,
    ),
    "arguments changed in place": (
        """
        def rotate(m): m[:] = [list(row) for row in zip(*m[::-1])]
        def zero(m): m[0][1] = 0
        def add(d, s): d["b"] = [2]; s.discard(1)
        def grown(x):
            x.append(1)
            return x
        """,
        """
        m = [[1, 2], [3, 4]]
        rotate(m)
        assert m == [[3, 1], [4, 2]]
        row = m[0]
        zero(m)
        assert row == [3, 0] and m[0] is row
        d, s = {"a": 1}, {1, 2}
        add(d, s)
        assert d == {"a": 1, "b": [2]} and s == {2}
        x = []
        assert grown(x) is x and x == [1]
        """,
    ),
    "functions both ways": (
        """
        import functools
        from concurrent.futures import ThreadPoolExecutor
        def each(function, xs): return [function(x) for x in xs]
        def threads(function, xs):
            with ThreadPoolExecutor(2) as pool: return list(pool.map(function, xs))
        def cached(function):
            known = {}
            @functools.wraps(function)
            def wrapped(x):
                if x not in known: known[x] = function(x)
                return known[x]
            return wrapped
        def counter():
            count = 0
            def more():
                nonlocal count
                count += 1
                return count
            return more
        def ask(thing): return thing.get("x") + 1
        def catches(function):
            try: return function()
            except KeyError as error: return "caught " + str(error)
        """,
        """
        from unittest.mock import Mock
        assert each(lambda x: x + 1, [1]) == [2] and each(str, [1]) == ["1"] and each(len, ["ab"]) == [2]
        assert threads(lambda x: x * x, [1, 2, 3]) == [1, 4, 9]
        calls = []
        @cached
        def double(x):
            "Twice."
            calls.append(x)
            return each(lambda y: 2 * y, [x])[0]
        assert double(2) == 4 and double(2) == 4 and calls == [2]
        assert double.__name__ == "double" and double.__doc__ == "Twice."
        more = counter()
        assert (more(), more(), counter()()) == (1, 2, 1)
        thing = Mock()
        thing.get.return_value = 4
        assert ask(thing) == 5
        thing.get.assert_called_once_with("x")
        assert catches(lambda: {}["k"]) == "caught 'k'" or catches(lambda: {}["k"]).startswith("caught")
        """,
    ),
    "objects": (
        """
        from dataclasses import dataclass
        import enum
        from collections import namedtuple
        @dataclass
        class Point:
            x: int
            y: int = 0
            def __add__(self, other): return Point(self.x + other.x, self.y + other.y)
            def __mul__(self, k): return Point(self.x * k, self.y * k)
            def __lt__(self, other): return self.x < other.x
            def __hash__(self): return hash(self.x)
        Pair = namedtuple("Pair", "a b")
        class Color(enum.Enum): RED = 1
        class Level(enum.IntEnum): LOW = 1
        class Tree:
            count = 0
            def __init__(self, value):
                self.value, self.children = value, []
                Tree.count += 1
            @property
            def total(self): return self.value + sum(child.total for child in self.children)
            @classmethod
            def leaf(cls): return cls(0)
            @staticmethod
            def kind(): return "tree"
        def pair(): return Pair(1, 2)
        def red(): return Color.RED
        def low(): return Level.LOW
        """,
        """
        assert Point(1) == Point(1, 0) and Point(1) != Point(2) and repr(Point(1)) == "Point(x=1, y=0)"
        assert Point(1, 2) + Point(3, 4) == Point(4, 6) and Point(1, 2) * 3 == Point(3, 6) and -1 < Point(1).x
        assert Point(1) < Point(2) and sorted([Point(3), Point(1)])[0].x == 1 and len({Point(1), Point(1)}) == 1
        assert Point(1) in [Point(1)] and {Point(1): 5}[Point(1)] == 5
        p = Point(1)
        p.x = 7
        assert p.x == 7 and isinstance(p, Point) and not isinstance(3, Point) and hasattr(p, "y") and not hasattr(p, "z")
        assert pair() == (1, 2) and pair().a == 1 and isinstance(pair(), Pair) and isinstance(pair(), tuple)
        assert red() is Color.RED and red() == Color.RED and red().name == "RED" and low() == 1 and low() == Level.LOW
        root = Tree(1)
        root.children.append(Tree(2))
        root.children[0].children.append(Tree(3))
        assert root.total == 6 and Tree.count == 3 and Tree.kind() == "tree" and isinstance(Tree.leaf(), Tree)
        """,
    ),
    "containers": (
        """
        from collections import OrderedDict
        class Stack:
            def __init__(self): self.items = []
            def push(self, x): self.items.append(x)
            def pop(self): return self.items.pop()
            def __len__(self): return len(self.items)
            def __iter__(self): return iter(self.items)
            def __getitem__(self, i): return self.items[i]
            def __bool__(self): return bool(self.items)
        class Bag(list):
            def put(self, x): self.append(x)
        class Cache(OrderedDict):
            def __init__(self, size): self.size = size
            def get(self, key):
                if key not in self: return -1
                self.move_to_end(key)
                return self[key]
            def put(self, key, value):
                self[key] = value
                self.move_to_end(key)
                if len(self) > self.size: self.popitem(last=False)
        class Evens:
            def __contains__(self, x): return x % 2 == 0
        def numbers(n):
            for i in range(n): yield i
        class Down:
            def __init__(self, n): self.n = n
            def __iter__(self): return self
            def __next__(self):
                if self.n == 0: raise StopIteration
                self.n -= 1
                return self.n
        """,
        """
        import types, pytest
        stack = Stack()
        assert not stack
        stack.push(1); stack.push("a")
        assert stack and len(stack) == 2 and list(stack) == [1, "a"] and 1 in stack and 7 not in stack and stack[0] == 1
        assert stack.pop() == "a" and [x for x in stack] == [1]
        with pytest.raises(IndexError):
            stack[9]
        bag = Bag()
        bag.put(1); bag.append(2)
        assert bag == [1, 2] and bag[-1] == 2 and bag.pop() == 2
        cache = Cache(2)
        cache.put(1, 1); cache.put(2, 2)
        assert cache.get(1) == 1
        cache.put(3, 3)
        assert cache.get(2) == -1 and list(cache) == [1, 3]
        assert 4 in Evens() and 3 not in Evens()
        assert isinstance(numbers(3), types.GeneratorType) and list(numbers(3)) == [0, 1, 2] and next(numbers(1)) == 0
        assert list(Down(3)) == [2, 1, 0] and sum(Down(4)) == 6
        with pytest.raises(StopIteration):
            next(Down(0))
        """,
    ),
    "nodes that tests and program both have": (
        """
        class TreeNode:
            def __init__(self, value=0, left=None, right=None): self.value, self.left, self.right = value, left, right
        def mirror(root):
            if root: root.left, root.right = mirror(root.right), mirror(root.left)
            return root
        def depth(root): return 0 if not root else 1 + max(depth(root.left), depth(root.right))
        def built(n): return TreeNode(n) if n == 0 else TreeNode(n, built(n - 1))
        """,
        """
        class TreeNode:
            def __init__(self, value=0, left=None, right=None): self.value, self.left, self.right = value, left, right
        root = TreeNode(1, TreeNode(2), None)
        assert depth(root) == 2 and mirror(root) is root and root.left is None and root.right.value == 2
        assert built(2).left.left.value == 0 and isinstance(built(1), TreeNode) and depth(built(300)) == 301
        """,
    ),
    "errors": (
        """
        class Refused(ValueError):
            def __init__(self, code):
                super().__init__(f"code {code}")
                self.code = code
        def refuse(): raise Refused(4)
        def number(x): return int(x)
        def leave(): raise SystemExit(3)
        """,
        """
        import pytest
        try:
            refuse()
            assert False
        except Refused as error:
            assert error.code == 4 and str(error) == "code 4" and error.args == ("code 4",)
        for kind in (ValueError, Exception, (KeyError, Refused)):
            with pytest.raises(kind):
                refuse()
        with pytest.raises(ValueError, match="invalid literal"):
            number("a")
        with pytest.raises(SystemExit) as left:
            leave()
        assert left.value.code == 3
        """,
    ),
    "standard streams": (
        """
        import sys
        def say(n):
            for i in range(n): print(i)
        def asked(): return int(input("? ")) * 2
        def lines(): return sum(int(line) for line in sys.stdin)
        """,
        """
        import contextlib, io, sys
        from unittest.mock import patch
        with contextlib.redirect_stdout(io.StringIO()) as out:
            say(2)
        assert out.getvalue() == "0\\n1\\n"
        with patch("builtins.input", side_effect=["5", "6"]):
            assert (asked(), asked()) == (10, 12)
        with patch("sys.stdin", io.StringIO("1\\n2\\n")):
            assert lines() == 3
        with patch("sys.stdin", io.StringIO("7\\n")):
            assert asked() == 14
        """,
    ),
    "the module": (
        """
        import random
        LIMIT = 5
        def roll(): return random.randint(1, 6) + LIMIT
        """,
        """
        import solution
        import solution as again
        from solution import LIMIT, roll as rolled
        from unittest.mock import patch
        assert LIMIT == 5 and again.LIMIT == 5
        with patch("solution.random.randint", return_value=3):
            assert rolled() == 8
        solution.LIMIT = 10
        with patch("solution.random.randint", return_value=1):
            assert solution.roll() == 11
        """,
    ),
    "asynchronous": (
        """
        import asyncio
        async def later(x):
            await asyncio.sleep(0)
            return x + 1
        """,
        """
        import asyncio, unittest
        async def main():
            return await asyncio.gather(later(1), later(2))
        assert asyncio.run(later(1)) == 2 and asyncio.run(main()) == [2, 3]
        """,
    ),
}


@pytest.mark.parametrize(("program", "tests"), CASES.values(), ids=CASES)
def test_two_sandboxes_are_as_one_process(program: str, tests: str) -> None:
    program, tests = textwrap.dedent(program), textwrap.dedent(tests)
    assert code_tests("p", f"```python\n{program}```", tests=tests, seconds=60.0) == 1.0


def test_a_loop_of_calls_is_affordable() -> None:
    """About 0.1 ms for each on an idle core."""
    tests = "for i in range(2000):\n    assert f(i) == i + 1"
    assert code_tests("p", "```python\ndef f(x): return x + 1\n```", tests=tests, seconds=30.0) == 1.0


def test_names_that_are_usually_imported_are_there() -> None:
    program = """
def f(xs: List[int], t: Optional[int] = None) -> int:
    heapify(xs)
    return [heappop(xs), heapq.nsmallest(1, xs)[0], gcd(4, 6), math.gcd(9, 6), bisect_left([1, 2], 2), Counter("aa")["a"],
            list(accumulate([1, 2])), reduce(lambda a, b: a * b, [2, 3]), inf > 1, collections.deque([1])[0]]
"""
    tests = "assert f([3, 1, 2]) == [1, 2, 2, 3, 1, 2, [1, 3], 6, True, 1]"
    assert code_tests("p", f"```python\n{program}```", tests=tests, seconds=60.0) == 1.0
