"""The notebook's functions, classes and enumerations mean in another process what they mean in the notebook."""

from __future__ import annotations

import pickle
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

from nbaccel.wire.payload import pack, unpack
from tests.wire.conftest import define

RECEIVER = """
import pickle, sys, types
from nbaccel.wire.payload import Parcel, install, unpack
main = sys.modules["__main__"] = types.ModuleType("__main__")
for parcel in pickle.load(sys.stdin.buffer):
    function, sidecar = unpack(Parcel(*parcel))
    install(sidecar, main, replace=True)
    print(repr(function()))
"""


def there(*functions: Callable[[], Any]) -> list[str]:
    """What these give when they come to another process, one after the other."""
    parcels = [tuple(pack(function, outward=True)[0]) for function in functions]
    done = subprocess.run(
        [sys.executable, "-c", RECEIVER], input=pickle.dumps(parcels), capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().splitlines()


def test_closures_go_on_sharing_their_variables(main: types.ModuleType) -> None:
    define(
        main,
        "def counter():\n"
        "    n = 0\n"
        "    def add():\n        nonlocal n\n        n += 1\n"
        "    def get():\n        return n\n"
        "    return add, get\n"
        "add, get = counter()\n"
        "def count():\n    add()\n    add()\n    return get()\n"
        "def parities():\n"
        "    def even(n):\n        return n == 0 or odd(n - 1)\n"
        "    def odd(n):\n        return n != 0 and even(n - 1)\n"
        "    return even\n"
        "even = parities()\n"
        "def unbound():\n"
        "    if False:\n        never = 1\n"
        "    return lambda: never\n"
        "unbound = unbound()\n"
        "class Base:\n    def __init__(self):\n        self.x = 1\n"
        "class Child(Base):\n    def __init__(self):\n        super().__init__()\n"
        "made = Child().__init__.__func__\n"
        "def rest():\n"
        "    child = Child()\n"
        "    made(child)\n"
        "    try:\n        unbound()\n"
        "    except NameError:\n        return even(10), even(7), child.x\n",
    )
    assert there(main.count, main.rest) == ["2", "(True, False, 1)"]


def test_registry_of_subclasses_holds_the_classes_themselves(main: types.ModuleType) -> None:
    define(
        main,
        "class Plugin:\n"
        "    registry = {}\n"
        "    told = []\n"
        "    def __init_subclass__(cls, *, key):\n"
        "        if not hasattr(cls, 'name'):\n            raise TypeError('a plugin needs a name')\n"
        "        Plugin.told.append(key)\n"
        "        Plugin.registry[key] = cls\n"
        "class A(Plugin, key='a'):\n    name = 'a'\n"
        "class B(A, key='b'):\n    name = 'b'\n"
        "def look():\n"
        "    own = Plugin.registry['a'] is A, Plugin.registry['b'] is B\n"
        "    return A.name, own, Plugin.told, Plugin.__subclasses__()\n"
        "def define():\n"
        "    class C(Plugin, key='c'):\n        name = 'c'\n"
        "    return Plugin.told\n",
    )
    expected = "('a', (True, True), ['a', 'b'], [<class '__main__.A'>])"
    assert there(main.look, main.look, main.define) == [expected, expected, "['a', 'b', 'c']"]


def test_class_is_made_without_the_code_of_its_metaclass(main: types.ModuleType) -> None:
    define(
        main,
        "import abc\n"
        "class Meta(abc.ABCMeta):\n"
        "    made = []\n"
        "    def __new__(meta, name, bases, body, *, tag):\n"
        "        if bases and 'run' not in body:\n            raise TypeError(f'{name} must define run')\n"
        "        Meta.made.append(tag)\n"
        "        return super().__new__(meta, name, bases, body)\n"
        "    def __init__(cls, name, bases, body, *, tag):\n"
        "        type.__setattr__(cls, 'tag', tag)\n"
        "    def __setattr__(cls, name, value):\n"
        "        if not name.startswith('_'):\n            raise AttributeError('a constant')\n"
        "        super().__setattr__(name, value)\n"
        "class Base(metaclass=Meta, tag='base'):\n"
        "    rate = 0.1\n"
        "    @abc.abstractmethod\n"
        "    def run(self): ...\n"
        "class Child(Base, tag='child'):\n    def run(self):\n        return self.rate\n"
        "class Virtual: ...\n"
        "Base.register(Virtual)\n"
        "def look():\n"
        "    try:\n        Base()\n"
        "    except TypeError:\n"
        "        return Child.tag, Child().run(), isinstance(Virtual(), Base), isinstance(3, Base), Meta.made\n",
    )
    assert there(main.look) == ["('child', 0.1, True, False, ['base', 'child'])"]


ENUMERATIONS = """
import dataclasses, datetime, enum
class Planet(enum.Enum):
    EARTH = (5.9, 6.3)
    MARS = (0.6, 3.3)
    def __init__(self, mass, radius):
        self.mass = mass
class Activation(str, enum.Enum):
    def __new__(cls, value, label):
        made = str.__new__(cls, value)
        made._value_, made.label = value, label
        return made
    RELU = ("relu", "Rectified")
class Coded(enum.Enum):
    def __new__(cls, code, text):
        made = object.__new__(cls)
        made._value_, made.text = code, text
        return made
class Status(Coded):
    DONE = 1, "done"
class Loose(enum.EnumMeta):
    def __getitem__(cls, name):
        return super().__getitem__(name.upper())
class Colour(enum.Enum, metaclass=Loose):
    RED = CRIMSON = 1
    ANY = [1, 2]
class Allowed(enum.Flag):
    READ = enum.auto()
    WRITE = enum.auto()
    RUN = enum.auto()
    BOTH = READ | WRITE
Allowed.usual = Allowed.READ | Allowed.RUN
@dataclasses.dataclass
class Size:
    width: int
class Page(Size, enum.Enum):
    SMALL = 3
class Day(datetime.date, enum.Enum):
    NEW_YEAR = 2020, 1, 1
class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2
kept = {Planet.MARS: Status.DONE}

def planets(): return Planet.EARTH.mass, Planet((0.6, 3.3)), kept[Planet.MARS].text, list(Planet)
def texts(): return Activation.RELU, Activation.RELU.value, Activation.RELU.label, Activation("relu") == "relu"
def bases(): return Status(1), Status.DONE.text, isinstance(Status.DONE, Coded)
def aliases(): return Colour["crimson"] is Colour.RED, Colour([1, 2]), list(Colour.__members__)
def flags(): return Allowed.usual is Allowed(5), Allowed["BOTH"] is Allowed(3), ~Allowed.READ, list(Allowed)
def mixed(): return Page.SMALL.width, Day.NEW_YEAR.year, Level.LOW + 1, Level.HIGH > 1, max(Level)
"""


def test_enumeration_arrives_as_it_is(main: types.ModuleType) -> None:
    define(main, ENUMERATIONS)
    functions = [main.planets, main.texts, main.bases, main.aliases, main.flags, main.mixed]
    assert there(*functions) == [repr(function()) for function in functions]


def test_member_that_comes_again_is_the_one_that_is_there(main: types.ModuleType) -> None:
    define(main, ENUMERATIONS)
    define(
        main,
        "import builtins\n"
        "def keep():\n    builtins.first = Planet.EARTH, Allowed.READ | Allowed.RUN, Allowed.usual\n"
        "def compare():\n"
        "    return all(map(lambda a, b: a is b, first, (Planet.EARTH, Allowed.READ | Allowed.RUN, Allowed.usual)))\n",
    )
    assert there(main.keep, main.compare) == ["None", "True"]


def test_member_comes_back_as_the_notebooks_own(main: types.ModuleType) -> None:
    define(main, ENUMERATIONS)
    sent = [main.Planet.EARTH, main.Activation.RELU, main.Allowed.READ | main.Allowed.RUN]
    parcel, _ = pack(sent, outward=True)
    sys.modules["__main__"] = types.ModuleType("__main__")
    arrived, _ = unpack(parcel)
    answer, _ = pack(arrived, outward=False)
    sys.modules["__main__"] = main
    back, _ = unpack(answer)
    assert all(one is other for one, other in zip(back, sent, strict=True))


def test_class_within_a_class_is_found_by_plain_pickle(main: types.ModuleType) -> None:
    define(
        main,
        "import pickle\n"
        "class Outer:\n    class Inner:\n        pass\n"
        "def save():\n    return type(pickle.loads(pickle.dumps(Outer.Inner()))) is Outer.Inner\n"
        "def look():\n    return Outer, save()\n",
    )
    assert there(main.look, main.look)[1] == "(<class '__main__.Outer'>, True)"
