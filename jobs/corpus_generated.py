"""Documents of the reference corpus that are generated: worked arithmetic and structured data."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from datetime import date, timedelta
from fractions import Fraction
from math import gcd

FIRST = """
    Ada Amir Anna Bela Boris Carla Chen Dana Diego Elif Emil Farah Finn Gita Hana Hugo Ines Ivan Jana
    Jonas Kofi Lena Liam Lucia Maya Milan Nadia Nils Noor Olga Omar Paula Pavel Priya Rosa Sami Sofia
    Tariq Thea Uma Vera Viktor Wei Yara Zoe
""".split()
LAST = """
    Abbott Adeyemi Bauer Berg Castro Dubois Eriksen Fischer Garcia Haddad Ito Jensen Kaya Kim Kowalski
    Lopez Marino Meyer Mwangi Novak Okafor Park Patel Petrov Quinn Rossi Sato Silva Singh Suzuki Tanaka
    Torres Varga Weber Xu Yilmaz Zhang
""".split()
CITIES = """
    Accra Athens Bergen Bogota Boston Cairo Dakar Delhi Dublin Geneva Hanoi Helsinki Izmir Jakarta Kyoto
    Lagos Leeds Lima Lisbon Lyon Madrid Milan Nairobi Oslo Porto Prague Quito Riga Seoul Sofia Tallinn
    Tunis Turin Vienna Warsaw Zagreb
""".split()
GOODS = """
    apple bag basket battery blanket book bottle bowl box brush cable camera candle carpet chair clock
    coat coin cup desk drill egg fan flower glass glove guitar hammer hat kettle key knife lamp laptop
    lemon map mirror mug needle orange paper pear pen pencil plate plum printer radio ribbon ring rope
    saw scarf shelf shirt shoe sofa spoon stamp table tent tile towel
""".split()
STATES = "new open paid packed shipped delivered returned cancelled refunded blocked archived draft".split()
TABLES = """
    orders customers products invoices payments shipments visits sensors employees tickets books flights
""".split()
NUMBER_FIELDS = (
    "price amount total weight height score rating stock duration distance speed temperature balance".split()
)
TEXT_FIELDS = "name city status category owner label country colour department title".split()


def add(rng: random.Random) -> str:
    a, b = rng.randint(12, 99999), rng.randint(12, 99999)
    steps, carry = [], 0
    for place, (x, y) in enumerate(zip(reversed(f"{a:06d}"), reversed(f"{b:06d}"), strict=True)):
        if place >= max(len(str(a)), len(str(b))):
            break
        total = int(x) + int(y) + carry
        steps.append(
            f"{x} + {y}{f' + {carry}' if carry else ''} = {total}, write {total % 10}, carry {total // 10}."
        )
        carry = total // 10
    return f"Add {a} and {b}.\n" + "\n".join(steps) + f"\n{a} + {b} = {a + b}"


def subtract(rng: random.Random) -> str:
    a, b = sorted((rng.randint(100, 99999), rng.randint(100, 99999)), reverse=True)
    tens = b % 100
    return (f"Compute {a} - {b}.\nTake away {b - tens}: {a} - {b - tens} = {a - b + tens}.\n"
            f"Take away {tens}: {a - b + tens} - {tens} = {a - b}.\nThe difference is {a - b}.")  # fmt: skip


def multiply(rng: random.Random) -> str:
    a, b = rng.randint(12, 999), rng.randint(12, 999)
    parts = [int(digit) * 10**place for place, digit in enumerate(reversed(str(b))) if digit != "0"][::-1]
    lines = [f"{a} * {part} = {a * part}" for part in parts]
    return (
        f"Multiply {a} by {b}.\n"
        + "\n".join(lines)
        + f"\nSum: {' + '.join(str(a * p) for p in parts)} = {a * b}"
    )


def divide(rng: random.Random) -> str:
    a, b = rng.randint(200, 99999), rng.randint(3, 48)
    lines, rest = [], 0
    for digit in str(a):
        rest = rest * 10 + int(digit)
        lines.append(f"{rest} / {b} = {rest // b} remainder {rest % b}")
        rest %= b
    return f"Divide {a} by {b}.\n" + "\n".join(lines) + f"\n{a} = {b} * {a // b} + {a % b}"


def fractions(rng: random.Random) -> str:
    a, b = Fraction(rng.randint(1, 15), rng.randint(2, 16)), Fraction(rng.randint(1, 15), rng.randint(2, 16))
    common = a.denominator * b.denominator // gcd(a.denominator, b.denominator)
    x, y = a.numerator * (common // a.denominator), b.numerator * (common // b.denominator)
    return (f"What is {a} + {b}?\nThe common denominator is {common}.\n"
            f"{a} = {x}/{common} and {b} = {y}/{common}.\n"
            f"{x}/{common} + {y}/{common} = {x + y}/{common} = {a + b}")  # fmt: skip


def equation(rng: random.Random) -> str:
    a, x, b = rng.randint(2, 19), rng.randint(-30, 60), rng.randint(-80, 80)
    sign, inverse = ("+", "Subtract") if b >= 0 else ("-", "Add")
    return (f"Solve {a}x {sign} {abs(b)} = {a * x + b}.\n{inverse} {abs(b)} on both sides: {a}x = {a * x}.\n"
            f"Divide by {a}: x = {x}.\nCheck: {a} * {x} {sign} {abs(b)} = {a * x + b}.")  # fmt: skip


def euclid(rng: random.Random) -> str:
    factor = rng.randint(1, 24)
    a, b = sorted((factor * rng.randint(4, 200), factor * rng.randint(4, 200)), reverse=True)
    lines, x, y = [], a, b
    while y:
        lines.append(f"{x} = {x // y} * {y} + {x % y}")
        x, y = y, x % y
    return f"Find the greatest common divisor of {a} and {b}.\n" + "\n".join(lines) + f"\ngcd({a}, {b}) = {x}"


def percentage(rng: random.Random) -> str:
    percent, base = rng.randint(1, 19) * 5, rng.randint(2, 400) * 20
    return (f"What is {percent}% of {base}?\n1% of {base} is {base / 100:g}.\n{percent} * {base / 100:g} = "
            f"{percent * base / 100:g}.\nSo {percent}% of {base} is {percent * base / 100:g}.")  # fmt: skip


def factorise(rng: random.Random) -> str:
    number = rng.choice((2, 3, 4, 6, 8, 9, 10, 12)) * rng.randint(5, 600)
    lines, factors, rest, prime = [], [], number, 2
    while rest > 1:
        if prime * prime > rest:
            prime = rest
        while rest % prime == 0:
            lines.append(f"{rest} / {prime} = {rest // prime}")
            factors.append(prime)
            rest //= prime
        prime += 1
    return f"Factorise {number}.\n" + "\n".join(lines) + f"\n{number} = {' * '.join(map(str, factors))}"


def sequence(rng: random.Random) -> str:
    start, step, n = rng.randint(-20, 90), rng.randint(-9, 25) or 4, rng.randint(8, 60)
    shown = ", ".join(str(start + step * i) for i in range(5))
    return (f"An arithmetic sequence begins {shown}. What is term number {n}?\nThe difference is {step}.\n"
            f"Term {n} = {start} + {n - 1} * {step} = {start} + {step * (n - 1)} "
            f"= {start + step * (n - 1)}")  # fmt: skip


def binary(rng: random.Random) -> str:
    number = rest = rng.randint(9, 1023)
    lines = []
    while rest:
        lines.append(f"{rest} = 2 * {rest // 2} + {rest % 2}")
        rest //= 2
    return f"Write {number} in binary.\n" + "\n".join(lines) + f"\nRead upwards: {number:b}"


def mean(rng: random.Random) -> str:
    count = rng.randint(3, 8)
    numbers = [rng.randint(1, 120) for _ in range(count)]
    numbers[-1] += -sum(numbers) % count
    return (f"Find the mean of {', '.join(map(str, numbers))}.\n"
            f"Sum: {' + '.join(map(str, numbers))} = {sum(numbers)}.\n"
            f"There are {count} numbers: {sum(numbers)} / {count} = {sum(numbers) // count}.")  # fmt: skip


def shopping(rng: random.Random) -> str:
    who, city = rng.choice(FIRST), rng.choice(CITIES)
    (x, y), p, q = rng.sample(GOODS, 2), rng.randint(2, 60), rng.randint(2, 60)
    n, m = rng.randint(2, 15), rng.randint(2, 15)
    bill = n * p + m * q
    paid = -(-bill // 100) * 100
    return (f"{who} buys {n} {x}s at {p} each and {m} {y}s at {q} each "
            f"in {city}, and pays with {paid}. What is the change?\n"
            f"The {x}s cost {n} * {p} = {n * p}. The {y}s cost {m} * {q} = {m * q}.\n"
            f"Together {n * p} + {m * q} = {bill}.\n"
            f"The change is {paid} - {bill} = {paid - bill}.")  # fmt: skip


def journey(rng: random.Random) -> str:
    (a, b), speed, hours = rng.sample(CITIES, 2), rng.randint(8, 60) * 2, rng.randint(2, 12)
    rest = rng.randint(10, 59)
    return (f"A train from {a} to {b} runs at {speed} km/h for {hours} hours and {rest} minutes. It leaves "
            f"at 06:00. When does it arrive, and how far has it gone after {hours} hours?\n"
            f"06:00 + {hours}:{rest} = {6 + hours:02d}:{rest}.\n"
            f"Distance after {hours} hours: {speed} * {hours} = {speed * hours} km.")  # fmt: skip


PROBLEMS: tuple[Callable[[random.Random], str], ...] = (
    add, subtract, multiply, divide, fractions, equation, euclid, percentage, factorise, sequence, binary,
    mean, shopping, journey,
)  # fmt: skip


def arithmetic(rng: random.Random) -> str:
    """A sheet of worked problems, of one kind or mixed."""
    kinds = PROBLEMS if rng.random() < 0.6 else (rng.choice(PROBLEMS),)
    style = rng.choice(("Problem {}: ", "{}. ", "{}) ", ""))
    return "\n\n".join(style.format(i + 1) + rng.choice(kinds)(rng) for i in range(rng.randint(3, 9)))


def record(rng: random.Random, fields: list[str]) -> dict[str, object]:
    """One record with the given fields."""
    values: dict[str, Callable[[], object]] = {
        "name": lambda: f"{rng.choice(FIRST)} {rng.choice(LAST)}", "owner": lambda: rng.choice(LAST),
        "city": lambda: rng.choice(CITIES), "country": lambda: rng.choice(CITIES)[:2].upper(),
        "status": lambda: rng.choice(STATES), "category": lambda: rng.choice(GOODS) + "s",
        "label": lambda: f"{rng.choice(GOODS)}-{rng.randint(1, 999):03d}",
        "title": lambda: f"{rng.choice(LAST)}'s {rng.choice(GOODS)}",
        "colour": lambda: rng.choice("red green blue black white yellow grey".split()),
        "department": lambda: rng.choice("sales support research finance legal operations".split()),
        "day": lambda: (date(2015, 1, 1) + timedelta(rng.randint(0, 4000))).isoformat(),
        "active": lambda: rng.random() < 0.5, "tags": lambda: rng.sample(GOODS, rng.randint(0, 3)),
    }  # fmt: skip
    return {f: values[f]() if f in values else round(rng.uniform(0, 500), rng.randint(0, 2)) for f in fields}


def data(rng: random.Random) -> str:
    """A table's schema with inserts and queries, a JSON list, JSON lines, or CSV."""
    fields = rng.sample(TEXT_FIELDS, rng.randint(1, 4)) + rng.sample(NUMBER_FIELDS, rng.randint(1, 3))
    fields += [extra for extra in ("day", "active", "tags") if rng.random() < 0.4]
    table, first = rng.choice(TABLES), rng.randint(1, 9000)
    rows = [{"id": first + i, **record(rng, fields)} for i in range(rng.randint(3, 10))]
    kind = rng.randrange(4)
    if kind == 0:
        return json.dumps({table: rows, "count": len(rows)}, indent=2)
    if kind == 1:
        return "\n".join(json.dumps(row) for row in rows)
    if kind == 2:
        return "\n".join(
            [",".join(rows[0]), *(",".join(str(v).replace(",", ";") for v in row.values()) for row in rows)]
        )
    return sql(rng, table, rows)


def literal(value: object) -> str:
    """A value as SQL writes it."""
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, (int, float)):
        return str(value)
    text = " ".join(value) if isinstance(value, list) else str(value)
    return "'" + text.replace("'", "''") + "'"


def sql(rng: random.Random, table: str, rows: list[dict[str, object]]) -> str:
    """CREATE TABLE, INSERT and queries with their answers for one table of records."""
    types = {bool: "BOOLEAN", int: "INTEGER", float: "NUMERIC"}
    columns = ",\n".join(
        f"    {f} {types.get(type(v), 'TEXT')}{' PRIMARY KEY' if f == 'id' else ''}"
        for f, v in rows[0].items()
    )
    inserts = [f"INSERT INTO {table} VALUES ({', '.join(map(literal, row.values()))});" for row in rows[:8]]
    return "\n".join(
        [f"CREATE TABLE {table} (\n{columns}\n);", *inserts, *(query(rng, table, rows)[1] for _ in range(3))]
    )


def query(rng: random.Random, table: str, rows: list[dict[str, object]]) -> tuple[str, str]:
    """A request in English and the SQL that answers it."""
    numbers = [f for f, v in rows[0].items() if isinstance(v, (int, float)) and not isinstance(v, bool)]
    texts = [f for f, v in rows[0].items() if isinstance(v, str)]
    number, text, row = rng.choice(numbers), rng.choice(texts or ["id"]), rng.choice(rows)
    n = rng.randint(2, 20)
    return rng.choice((
        (f"Show the {n} {table} with the highest {number}.",
         f"SELECT * FROM {table} ORDER BY {number} DESC LIMIT {n};"),
        (f"How many {table} are there for each {text}?",
         f"SELECT {text}, COUNT(*) FROM {table} GROUP BY {text};"),
        (f"List all {table} whose {text} is {row[text]}.",
         f"SELECT * FROM {table} WHERE {text} = {literal(row[text])};"),
        (f"What is the average {number} of the {table}?", f"SELECT AVG({number}) FROM {table};"),
        (f"Which {text} has a total {number} above {n * 10}?",
         f"SELECT {text}, SUM({number}) FROM {table} GROUP BY {text} HAVING SUM({number}) > {n * 10};"),
        (f"Delete the {table} with {number} below {n}.", f"DELETE FROM {table} WHERE {number} < {n};"),
        (f"Set {number} to {n} for the {table} with id {row['id']}.",
         f"UPDATE {table} SET {number} = {n} WHERE id = {row['id']};"),
        (f"Find the {table} with {number} between {n} and {n * 7}.",
         f"SELECT id, {text} FROM {table} WHERE {number} BETWEEN {n} AND {n * 7} ORDER BY {text};"),
    ))  # fmt: skip
