r"""Why ``math_answer`` may call an answer right that math-verify alone calls wrong: each way has examples
that were looked at.

By the name that the verdict gives: equal answers, and answers that differ although the same rule reads them.
"""

from __future__ import annotations

Pair = tuple[str, str]  # reference, answer

DECIDED: dict[str, tuple[list[Pair], list[Pair]]] = {
    "number": ([("42", "42.0"), ("-7", "-7")], [("42", "43"), ("7", "-7"), ("25", "2.5")]),
    "same text": (
        [
            ("f'", "f'"),
            ("\\overline{AB}", "\\overline{AB}"),
            ("2516_8", "2516_{8}"),
            ("\\dfrac{a}{b}", "\\frac ab"),
        ],
        [("12", "1 2"), ("\\overline{AB}", "AB"), ("(p,q)", "(p,q]")],
    ),
    "choice": (
        [
            ("C", "(C)"),
            ("(C)", "C."),
            ("\\text{A,B,E}", "A, B, and E"),
            ("C", "\\textbf{(C)}\\ 16"),
            ("B", "option B"),
        ],
        [("A", "B"), ("A", "A, B"), ("\\text{A,B}", "A"), ("A", "a"), ("C", "CD"), ("A", "Answer")],
    ),
    "words": (
        [
            ("\\text{east}", "East."),
            ("hello world", "Hello, world!"),
            ("yes", "\\text{Yes}"),
            ("\\text{Navin}", "Navin"),
        ],
        [
            ("east", "seat"),
            ("\\text{east}", "-east"),
            ("\\text{odd}", "odd+1"),
            ("yes", "yes and no"),
            ("yes", "no"),
        ],
    ),
    "time of day": (
        [("4:30 \\text{ p.m.}", "16:30"), ("8:30 a.m.", "8:30 AM")],
        [("4:30 p.m.", "4:30 a.m."), ("4:30 p.m.", "4:31 p.m."), ("8:30 a.m.", "8.5")],
    ),
    "base": (
        [("101_2", "101_{\\text{two}}"), ("101_2", "101"), ("1F_{16}", "1F base 16"), ("101", "101_2")],
        [("101_2", "101_3"), ("101_2", "5"), ("101_2", "110_2"), ("5", "101_2"), ("204_5", "57_5")],
    ),
    "algebra": (
        [("6r^2-4r-24", "2(3r^2-2r-12)"), ("7", "+7"), ("(3,-2)", "(+3,-2)")],
        [("n^2", "n^3"), ("-7", "+7"), ("7", "+-7")],
    ),
    "excess": ([], [("1", "1" * 2000), ("x", "x+" * 30), ("1", "(1+" * 9 + "1" + ")" * 9)]),
}

RULES: dict[str, tuple[list[Pair], list[Pair]]] = {
    "doubled backslashes": (
        [
            ("\\frac{3}{4}", "\\\\frac{6}{8}"),
            (
                "\\begin{pmatrix} 1 \\\\ y \\end{pmatrix}",
                "\\\\begin{pmatrix} 1 \\\\\\\\ \\\\frac{2y}{2} \\\\end{pmatrix}",
            ),
            (
                "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}",
                "\\\\begin{pmatrix} 1 \\\\ \\\\frac{4}{2} \\\\end{pmatrix}",
            ),
        ],
        [
            ("\\frac{3}{4}", "\\\\frac{4}{3}"),
            ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\\\begin{pmatrix} 2 \\\\ 1 \\\\end{pmatrix}"),
        ],
    ),
    "Unicode": (
        [
            ("2\\sqrt{3}", "2\u221a3"),
            ("\\frac{\\sqrt{x+1}}{2}", "\u221a(x+1)/2"),
            ("(-\\infty, 3]", "(\u2212\u221e, 3]"),
            ("x^{12}", "x\u00b9\u00b2"),
            ("a_{10}+1", "1+a\u2081\u2080"),
            ("1.5", "1\u00bd"),
            ("2\\pi r", "2\u03c0r"),
            ("x+3", "\uff13\uff0bx"),
            ("x \\ne 3", "x \u2260 3"),
            ("12000", "12\u202f000"),
        ],
        [
            ("2\\sqrt{3}", "2\u221a5"),
            ("\\infty", "\u2212\u221e"),
            ("x^2", "x\u00b3"),
            ("\\frac{1}{2}", "\u2153"),
            ("\\pi", "\u03c6"),
            ("x \\le 3", "x \u2265 3"),
        ],
    ),
    "escaped currency": (
        [("36", "It costs \\$36"), ("18.90", "\\$18.9")],
        [("36", "\\$35"), ("\\$18.90", "10.20")],
    ),
    "upright constant": ([("1+e", "\\mathrm{e}+1")], [("1 - \\frac{1}{e}", "1 + \\frac{1}{\\mathrm{e}}")]),
    "Python equation": ([("y = 2x", "Eq(y, 2*x)")], [("Eq(x**2/4 + y**2/3, 1)", "Eq(x**2/16 + y**2/12, 1)")]),
    "Python power": ([("x^{10}", "x**10"), ("2^n", "2**n")], [("x^{10}", "x**11"), ("x^2", "x*2**1")]),
    "spaced thousands": (
        [("10000", "10\\,000"), ("1234567", "1\\,234\\,567"), ("12\\;500.5", "12500.5")],
        [("10000", "10\\,00"), ("10000", "10\\,001"), ("1000", "1\\,0000")],
    ),
    "thousands alone": (
        [("12000", "12 000"), ("-1234567.5", "-1 234 567.5")],
        [("12", "12 000"), ("12000", "12 00"), ("12000", "12 000 1"), ("1200", "1, 200")],
    ),
    "scientific": (
        [("1500", "1.5e3"), ("1.5 \\times 10^{-4}", "1.5E-4"), ("x = 200", "x = 2e+2")],
        [("1500", "1.5e4"), ("1e-9", "2e-9"), ("1500", "1.5e-3")],
    ),
    "product of numbers": ([("26000", "1000(26)")], [("1026", "1000(26)")]),
    "glued conjunction": ([("x=1, x=-1", "x=1orx=-1")], [("x=1, x=-1", "x=1orx=1")]),
    "empty set": (
        [("\\varnothing", "\\emptyset"), ("\\emptyset", "\\{ \\}")],
        [("\\varnothing", "0"), ("\\varnothing", "\\{0\\}")],
    ),
    "degrees in an argument": (
        [
            ("\\frac{\\sqrt{3}}{2}", "\\sin 60^\\circ"),
            ("\\cos x", "\\sin(90^{\\circ}-x)"),
            ("1", "\\tan \\left(45^\\circ\\right)"),
        ],
        [("\\sin 30^\\circ", "\\sin 30"), ("\\frac{1}{2}", "\\sin 60^\\circ"), ("60", "\\sin 60^\\circ")],
    ),
    "prime": ([("f'(x) = 2x", "2x"), ("x'+1", "1+x'")], [("x'", "x"), ("x'", "x''"), ("f'(x)", "f(x)")]),
    "full stop in a formula": ([("-2 + 7i", "$7i - 2.$")], [("-2 + 7i", "$7i + 2.$")]),
    "unit": (
        [
            ("10 \\text{ cm}^2", "10 cm^2"),
            ("5 \\text{ m/s}", "5 m/s"),
            ("5", "5 m/s^2"),
            ("10 \\text{ \u00b0C}", "10\u00b0C"),
            ("25", "25 \u00b0C"),
            ("10 \\text{ cm}", "10 centimeters"),
            ("270/7 \\text{ degrees}", "\\frac{270}{7}"),
            ("65", "65 cubic units"),
            ("x\\text{ inches}", "x"),
            ("120", "120 ways"),
        ],
        [
            ("5 \\text{ cm}", "5 \\text{ m}"),
            ("5 \\text{ cm}^2", "5 \\text{ cm}^3"),
            ("4t", "4"),
            ("5m", "5"),
            ("10 \\text{ cm}", "11 cm"),
            ("25^\\circ C", "25^\\circ F"),
            ("x", "2 m"),
        ],
    ),
    "argument's name": (
        [("f(x) = x^2 + x", "f(t) = t + t^2"), ("W(n) = 1", "W(x) = \\frac{2}{2}")],
        [("f(x) = x^2", "g(t) = t^2"), ("f(x) = x", "f(t) = x"), ("f(x)", "f(y)")],
    ),
    "one number": (
        [("90", "[90]"), ("0.5", "[1/2]"), ("1000.99", "1000,99")],
        [("90", "[91]"), ("25", "2,5"), ("[90, 91]", "[90]")],
    ),
    "calculator": (
        [("2\\sqrt{3}", "2*sqrt(3)"), ("3\\pi", "3*pi"), ("1.5", "1 1/2"), ("3, 4", "4 or 3")],
        [("2\\sqrt{3}", "2*sqrt(5)"), ("3\\pi", "2*pi"), ("134", "1 3/4"), ("3, 4", "3 and 5")],
    ),
}
