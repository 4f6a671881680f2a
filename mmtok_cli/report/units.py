"""Numbers as text: human units, three significant digits."""


def plural(number: float, noun: str, nouns: str = "") -> str:
    """ "1 sample", "2 samples". nouns: the plural, if it takes more than an s."""
    return f"{number} {noun if number == 1 else nouns or noun + 's'}"


def duration(value: float) -> str:
    """A long time in seconds, minutes or hours."""
    if value < 120:
        return seconds(value)
    minutes = round(value / 60)
    return f"{minutes} minutes" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def seconds(value: float) -> str:
    """A short time in s, ms or µs."""
    factor, unit = _unit_of(value)
    return f"{_digits(value * factor)} {unit}"


def spread(median: float, low: float, high: float) -> str:
    """A short time and its spread, all in one unit: "15.4 ms (10.6–17.7)"."""
    factor, unit = _unit_of(median)
    return f"{_digits(median * factor)} {unit} ({_digits(low * factor)}–{_digits(high * factor)})"


def _unit_of(value: float) -> tuple[float, str]:
    if value >= 0.9995:
        return 1, "s"
    return (1e3, "ms") if value >= 0.9995e-3 else (1e6, "µs")


def _digits(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


def size(value: float | None) -> str:
    """Bytes in binary units; a dash if there is no value."""
    if value is None:
        return "–"
    units = ["B", "KiB", "MiB", "GiB"]
    while len(units) > 1 and abs(value) >= 999.5:
        value /= 1024
        units.pop(0)
    return f"{_digits(value)} {units[0]}"


def points(value: float) -> str:
    """A difference of two scores in percent: "+0.6"."""
    return f"{value:+.1f}" if abs(value) >= 0.05 else "0.0"


def picture_size(value: tuple[int, int] | None) -> str | None:
    """Width and height in pixels: "1024x768"."""
    return None if value is None else f"{value[0]}x{value[1]}"


def count(value: float) -> str:
    """A number with an SI suffix: 2.05 M, 8.45 T."""
    suffixes = ["", " k", " M", " G", " T"]
    while len(suffixes) > 1 and abs(value) >= 999.5:
        value /= 1000
        suffixes.pop(0)
    return f"{_digits(value)}{suffixes[0]}"


def cpus(value: float) -> str:
    """A number of processors that are kept busy, on average: "1.7 CPUs"."""
    return f"{value:.2g} CPUs"


def number(value: float) -> str:
    """An integer where it is one, else one decimal."""
    return f"{value:.0f}" if value == int(value) else f"{value:.1f}"


def rate(value: float) -> str:
    """A rate per second, to three digits."""
    return _digits(value)


def share(value: float | None) -> str:
    """A share in percent; a dash if there is none."""
    return "–" if value is None else f"{100 * value:.1f} %"


def shares(value: float) -> str:
    """A share in percent, without the percent sign."""
    return f"{100 * value:.1f}"


def p_value(value: float) -> str:
    """A probability, to three decimals."""
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def ratio(value: float) -> str:
    """A speedup without the x, three digits."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"
