#ifndef PITLANE_EXPONENTIAL_H
#define PITLANE_EXPONENTIAL_H

/* exp(x) for x <= 0, within 2 units in the last place; 0 for large negative x. */
TARGET INLINE Floats exponential(Floats x) {
    x = at_least(x, -150.0f);
    Floats n = nearest(multiply(x, all(1.44269504089f)));
    Floats r = multiply_add(n, all(2.12194440e-4f), multiply_add(n, all(-0.693359375f), x));
    Floats p = multiply_add(all(1.9875691500e-4f), r, all(1.3981999507e-3f));
    p = multiply_add(p, r, all(8.3334519073e-3f));
    p = multiply_add(p, r, all(4.1665795894e-2f));
    p = multiply_add(p, r, all(1.6666665459e-1f));
    p = multiply_add(p, r, all(5.0000001201e-1f));
    return times_power(multiply_add(p, multiply(r, r), add(r, all(1.0f))), n);
}

#endif
