"""When an answer to a problem of mathematics counts as right."""

import pytest

from research.experiments.judges import boxed, final_answer, same_mathematics


@pytest.mark.parametrize(
    ("generated", "expected"),
    [
        (r"So $x = \boxed{\dfrac{1}{2}}$.", r"\frac12"),
        (r"\boxed{0.5}", r"\frac{1}{2}"),
        (r"first \boxed{3}, then \boxed{\frac{\sqrt{3}}{2}}", r"\frac{\sqrt3}{2}"),
        ("8 + 8 = 16\n#### 16", "16"),
        ("#### 1/2", r"\frac{1}{2}"),
        (r"The answer is $\frac{3}{4}$.", r"\tfrac34"),
        ("There are 12 ways, so the answer is 12.", "12"),
        ("There are 12 ways.", "12"),
        (r"\boxed{10080}", r"10,\!080"),
        (r"\boxed{58,500}", "58500"),
        (r"\boxed{-.5}", r"-\frac{1}{2}"),
        (r"\boxed{3.50}", "3.5"),
        (r"\boxed{137\frac12}", "137.5"),
        (r"\boxed{-1\frac{1}{2}}", r"-\frac{3}{2}"),
        (r"\boxed{x = 5}", "5"),
        (r"\boxed{2, -1}", "-1, 2"),
        (r"\boxed{(2,-1)}", r"\left( 2, -1 \right)"),
        (r"\boxed{\left(\frac12, 3\right)}", "(0.5, 3)"),
        (r"\boxed{30^{\circ}}", r"30^\circ"),
        (r"\boxed{15 \text{ cm}^2}", "15"),
        (r"\boxed{\$18.90}", "18.9"),
        (r"\boxed{50\%}", "50"),
        (r"\boxed{\text{Evelyn}}", "Evelyn"),
        (r"\boxed{x \in [-2,7]}", "[-2, 7]"),
        (r"\boxed{\begin{pmatrix} 1/5 \\ 2 \end{pmatrix}}", r"\begin{pmatrix}1/5\\2\end{pmatrix}"),
    ],
)
def test_right(generated, expected):
    assert same_mathematics(generated, expected)


@pytest.mark.parametrize(
    ("generated", "expected"),
    [
        (r"\boxed{5}", "-5"),
        (r"\boxed{(1,2)}", "(2,1)"),  # a point, not a list
        (r"\boxed{(1,2)}", "[1,2]"),
        (r"\boxed{1,2}", "1,2,2"),
        (r"\boxed{1,1}", "1,2"),
        (r"\boxed{\frac{1}{3}}", "0.33"),
        (r"\boxed{2x+3}", "2x-3"),
        (r"\boxed{x^{12}}", "x^{21}"),
        (r"\boxed{12_5}", "12"),
        ("The answer is 7. It is not 12.", "12"),
        (r"\boxed{3} or 12", "12"),
        ("I do not know.", "12"),
        ("", "12"),
        (r"\boxed{", "12"),
    ],
)
def test_wrong(generated, expected):
    assert not same_mathematics(generated, expected)


def test_where_the_answer_stands():
    assert boxed(r"so \boxed{\frac{a}{\sqrt{2}}} it is") == r"\frac{a}{\sqrt{2}}"
    assert boxed(" none ") == "none"
    assert final_answer("1 + 1 = 2\n#### 2\nmore") == "2"
    assert final_answer("We get 3 and 1,200.") == "1,200"
