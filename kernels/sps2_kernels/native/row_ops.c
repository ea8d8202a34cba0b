/* The small operators of a decoder layer, each in one pass over its rows: what a decode step of few rows spends on
 * them otherwise is not arithmetic but some 250 calls. Rows are fp32; strides are in elements, the last one is 1. */
#include <math.h>
#include <stdint.h>
#include <string.h>

/* A row costs more to hand to a thread than to compute below this many values in all. */
#define WORTH_THREADS 32768

static inline float exponential(float x) {
    float most = x > 88.0f ? INFINITY : 0.0f;
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float twos = rintf(x * 1.44269504f);
    float rest = x - twos * 0.69314718f; /* in +-0.347 */
    float power = 1.0f / 720.0f;
    power = power * rest + 1.0f / 120.0f;
    power = power * rest + 1.0f / 24.0f;
    power = power * rest + 1.0f / 6.0f;
    power = power * rest + 0.5f;
    power = power * rest + 1.0f;
    power = power * rest + 1.0f;
    union {
        int32_t bits;
        float value;
    } scale = {((int32_t)twos + 127) << 23};
    return power * scale.value + most;
}

/* y = x / sqrt(mean(x^2) + eps) * weight; x [tokens, heads, size] by strides, y contiguous. */
void rows_norm(const float *x, int64_t token_stride, int64_t head_stride, const float *weight, float eps,
               int64_t tokens, int64_t heads, int64_t size, int threads, float *y) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && tokens * heads * size > WORTH_THREADS)
    for (int64_t row = 0; row < tokens * heads; row++) {
        const float *from = x + row / heads * token_stride + row % heads * head_stride;
        float *to = y + row * size, sum = 0;
        for (int64_t i = 0; i < size; i++) sum += from[i] * from[i];
        float factor = 1.0f / sqrtf(sum / size + eps);
        for (int64_t i = 0; i < size; i++) to[i] = from[i] * factor * weight[i];
    }
}

static void turn(const float *from, const float *c, const float *s, int64_t half, float *to) {
    for (int64_t i = 0; i < half; i++) {
        float first = from[i], second = from[half + i];
        to[i] = first * c[i] - second * s[i];
        to[half + i] = second * c[i] + first * s[i];
    }
}

/* (a, b) -> (a cos - b sin, b cos + a sin), with a and b the halves of a head; x and y [tokens, heads, 2 half] by
 * strides, cos and sin of a token in rows of the given strides. */
void rows_rotate(const float *x, int64_t x_token, int64_t x_head, const float *cosines, int64_t cos_token,
                 const float *sines, int64_t sin_token, int64_t tokens, int64_t heads, int64_t half, int threads,
                 float *y, int64_t y_token, int64_t y_head) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && tokens * heads * half > WORTH_THREADS)
    for (int64_t row = 0; row < tokens * heads; row++) {
        int64_t token = row / heads, head = row % heads;
        turn(x + token * x_token + head * x_head, cosines + token * cos_token, sines + token * sin_token, half,
             y + token * y_token + head * y_head);
    }
}

/* Rows [q heads | k heads | v heads] of heads of 2 half: q and k turned, v as it is; q, k, v contiguous. */
void rows_split(const float *qkv, const float *cosines, int64_t cos_token, const float *sines, int64_t sin_token,
                int64_t tokens, int64_t q_heads, int64_t kv_heads, int64_t half, int threads, float *q, float *k,
                float *v) {
    int64_t heads = q_heads + 2 * kv_heads, size = 2 * half;
#pragma omp parallel for num_threads(threads) if (threads > 1 && tokens * heads * half > WORTH_THREADS)
    for (int64_t token = 0; token < tokens; token++) {
        const float *from = qkv + token * heads * size;
        const float *c = cosines + token * cos_token, *s = sines + token * sin_token;
        for (int64_t head = 0; head < q_heads; head++, from += size)
            turn(from, c, s, half, q + (token * q_heads + head) * size);
        for (int64_t head = 0; head < kv_heads; head++, from += size)
            turn(from, c, s, half, k + (token * kv_heads + head) * size);
        memcpy(v + token * kv_heads * size, from, kv_heads * size * sizeof(float));
    }
}

/* Puts rows of `bytes` of k and v into slots of their caches. */
void rows_append(const char *k, const char *v, const int64_t *slots, int64_t rows, int64_t bytes, char *k_cache,
                 char *v_cache) {
    for (int64_t row = 0; row < rows; row++) {
        memcpy(k_cache + slots[row] * bytes, k + row * bytes, bytes);
        memcpy(v_cache + slots[row] * bytes, v + row * bytes, bytes);
    }
}

/* y = silu(gate) * up; [gate | up] in rows of 2 size, y in rows of size. */
void rows_swiglu(const float *gate_up, int64_t rows, int64_t size, int threads, float *y) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * size > WORTH_THREADS)
    for (int64_t row = 0; row < rows; row++) {
        const float *gate = gate_up + row * 2 * size, *up = gate + size;
        float *to = y + row * size;
        for (int64_t i = 0; i < size; i++) to[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
    }
}
