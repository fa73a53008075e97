"""Quantiles of Student's t, for the intervals of means over seeds."""

import math


def t_quantile(freedom: int) -> float:
    """Returns t with P(|T| <= t) = 0.95 for Student's T with 1, 2, ... degrees of freedom.

    The probability is a finite sum of powers of cos(atan(t / sqrt(freedom))) (Abramowitz and Stegun, 26.7.3 and 26.7.4);
    it grows with the angle, which is found by bisection to the last bit.

    Example:
        >>> round(t_quantile(2), 3), round(t_quantile(4), 3)
        (4.303, 2.776)
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        cosine = math.cos(angle)
        term = total = cosine if freedom % 2 else 1.0
        for k in range(2 + freedom % 2, freedom - 1, 2):
            term *= (k - 1) / k * cosine * cosine
            total += term
        inside = math.sin(angle) * (total if freedom > 1 else 0.0)
        probability = 2 / math.pi * (angle + inside) if freedom % 2 else inside
        low, high = (angle, high) if probability < 0.95 else (low, angle)
    return math.sqrt(freedom) * math.tan(low)
