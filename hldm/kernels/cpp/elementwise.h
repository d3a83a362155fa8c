// Elementwise functions that a compiler turns into vector code, in float and in double.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

template <typename To, typename From>
inline To same_bits(From x) {
    To y;
    static_assert(sizeof y == sizeof x, "a number of as many bits");
    std::memcpy(&y, &x, sizeof x);
    return y;
}

inline float from_bits(int32_t bits) { return same_bits<float>(bits); }
inline double from_bits(int64_t bits) { return same_bits<double>(bits); }
inline int32_t to_bits(float x) { return same_bits<int32_t>(x); }
inline int64_t to_bits(double x) { return same_bits<int64_t>(x); }

// What an exponential needs to know of its number: how far it goes (what is beyond makes no difference to any use here,
// and denormal numbers would make all of this ten times slower); 1.5 * 2^mantissa, since what is added to it is rounded
// to an integer; ln 2 in two parts, the first of so few digits that integers times it are exact; and how the Taylor
// series of (exp(r) - 1 - r) / r^2 is summed, |r| <= ln(2) / 2.
template <typename T>
struct Digits;

template <>
struct Digits<float> {
    static constexpr float most = 60.0f, magic = 12582912.0f, ln2 = 0.693359375f, ln2_rest = -2.12194440e-4f;
    static constexpr int mantissa = 23, bias = 127;

    static float series(float r) {
        float sum = 1.0f / 5040;
        sum = sum * r + 1.0f / 720;
        sum = sum * r + 1.0f / 120;
        sum = sum * r + 1.0f / 24;
        sum = sum * r + 1.0f / 6;
        return sum * r + 0.5f;
    }
};

template <>
struct Digits<double> {
    static constexpr double most = 700.0, magic = 6755399441055744.0;
    static constexpr double ln2 = 0.693147180369123816490, ln2_rest = 1.90821492927058770002e-10;
    static constexpr int mantissa = 52, bias = 1023;

    static double series(double r) {
        double sum = 1.0 / 6227020800;
        sum = sum * r + 1.0 / 479001600;
        sum = sum * r + 1.0 / 39916800;
        sum = sum * r + 1.0 / 3628800;
        sum = sum * r + 1.0 / 362880;
        sum = sum * r + 1.0 / 40320;
        sum = sum * r + 1.0 / 5040;
        sum = sum * r + 1.0 / 720;
        sum = sum * r + 1.0 / 120;
        sum = sum * r + 1.0 / 24;
        sum = sum * r + 1.0 / 6;
        return sum * r + 0.5;
    }
};

// exp(x) = scale (1 + q), to a relative error of about 1e-7 or 3e-16, of q, near x = 0, too; NaN stays NaN.
// x = k ln 2 + r: scale = 2^k, q = exp(r) - 1.
template <typename T>
struct Exponential {
    T scale, q;

    explicit Exponential(T x) {
        using D = Digits<T>;
        x = x < -D::most ? -D::most : x;
        x = x > D::most ? D::most : x;
        const T shifted = x * T(1.44269504088896340736) + D::magic;
        const T k = shifted - D::magic;
        const T r = (x - k * D::ln2) - k * D::ln2_rest;
        q = D::series(r) * r * r + r;
        scale = from_bits((to_bits(shifted) - to_bits(T(D::magic)) + D::bias) << D::mantissa);
    }
};

template <typename T>
inline T exponential(T x) {
    const Exponential<T> e(x);
    return e.scale * e.q + e.scale;
}

template <typename T>
inline T exp_minus_one(T x) {
    const Exponential<T> e(x);
    return e.scale * e.q + (e.scale - T(1));
}

template <typename T>
inline T sigmoid(T x) {
    return T(1) / (T(1) + exponential(-x));
}

// The tanh approximation of gelu: x (1 + tanh(u)) / 2 = x sigmoid(2 u), and its derivative.
template <typename T>
inline T gelu(T x) {
    const T twice_root = T(1.5957691216057308);  // 2 sqrt(2 / pi)
    return x * sigmoid(twice_root * (x + T(0.044715) * x * x * x));
}

template <typename T>
inline T gelu_slope(T x) {
    const T twice_root = T(1.5957691216057308);
    const T s = sigmoid(twice_root * (x + T(0.044715) * x * x * x));
    return s + x * s * (1 - s) * twice_root * (1 + 3 * T(0.044715) * x * x);
}

// gelu itself, to 1e-7: erfc is Abramowitz and Stegun's 7.1.26, as in torch.
inline float exact_gelu(float x) {
    const float y = std::fabs(x) * 0.70710678f;
    const float t = 1.0f / (1.0f + 0.3275911f * y);
    float sum = 1.061405429f;
    sum = sum * t - 1.453152027f;
    sum = sum * t + 1.421413741f;
    sum = sum * t - 0.284496736f;
    sum = sum * t + 0.254829592f;
    const float half = 0.5f * x * sum * t * exponential(-y * y);
    return x < 0 ? half : x - half;
}

// log(1 + exp(x)) to a relative error of about 1e-6. With 1 + exp(x) = 2^k m: k ln 2 + 2 atanh((m - 1) / (m + 1)).
inline float softplus(float x) {
    const float y = exponential(x);
    const float one_more = 1.0f + y;
    const int32_t k = (to_bits(one_more) - to_bits(0.70710678f)) >> 23;  // m lies within [sqrt(1/2), sqrt(2))
    const float m = from_bits(to_bits(one_more) - (k << 23));
    const float f = k == 0 ? y : m - 1.0f;  // y itself: 1 + y has lost its digits where y is small
    const float s = f / (2.0f + f), s2 = s * s;
    const float series = 1.0f + s2 * (1.0f / 3 + s2 * (1.0f / 5 + s2 * (1.0f / 7 + s2 * (1.0f / 9))));
    const float small = k * 0.693147181f + 2.0f * s * series;
    return x > 20.0f ? x : small;  // as torch
}
