// Attention of single queries over runs of cache slots, in fp32: the form of paged_decode_partial on a CPU.
//
// Compiled for one shape: HEAD_DIM (a multiple of the vector's 16 floats), KV_HEADS, and FOLD query heads to each.
// Each key and value is read once, by the thread whose share of all rows' keys it is in; a row that several threads
// share is merged at the end. Knows nothing of ranks, pages or torch.

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
    LANES = 16,
    VECTORS = HEAD_DIM / LANES,
    HEADS = KV_HEADS * FOLD,
    SLOT = KV_HEADS * HEAD_DIM, // floats
    BLOCK = 8,                  // keys a head takes at a time: so few that memory is read nearly in order
    CHUNK = 16 / FOLD > VECTORS ? VECTORS : 16 / FOLD ? 16 / FOLD : 1, // vectors of o summed in registers
    MIN_SHARE = 128,            // keys below which a thread costs more than it saves
    AHEAD = 4 * SLOT * 4,       // bytes that are fetched ahead: four slots
};
#define UNROLL _Pragma("GCC unroll 16")

typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));

typedef struct {
    Vector o[HEADS][VECTORS]; // not yet divided by total
    float top[HEADS];         // largest score so far
    float total[HEADS];       // sum of e^(score - top)
} State;

// e^x of x <= 0, to 2 units in the last place; 0 where that is no normal number. Cephes' polynomial.
static inline float exp_of_negative(float x) {
    float clamped = x < -87.0f ? -87.0f : x;
    float n = rintf(clamped * 1.44269504f);
    float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { int32_t i; float f; } power = {.i = ((int32_t)n + 127) << 23};
    return x < -87.0f ? 0.0f : p * power.f;
}

static inline float sum_lanes(Vector x) {
    float sum = 0.0f;
    for (int lane = 0; lane < LANES; lane++) sum += x[lane];
    return sum;
}

static void start(State *s) {
    memset(s, 0, sizeof *s);
    for (int head = 0; head < HEADS; head++) s->top[head] = -INFINITY;
}

// scores[f][j] = q[f] . k[j]
static void score(const Vector q[FOLD][VECTORS], const float *k, int num_keys, float scores[FOLD][BLOCK]) {
    for (int j = 0; j < num_keys; j++) {
        const Vector *key = (const Vector *)(k + j * SLOT);
        UNROLL for (int d = 0; d < VECTORS; d++) __builtin_prefetch((const char *)(key + d) + AHEAD);
        UNROLL for (int f = 0; f < FOLD; f++) {
            Vector sum = q[f][0] * key[0];
            UNROLL for (int d = 1; d < VECTORS; d++) sum += q[f][d] * key[d];
            scores[f][j] = sum_lanes(sum);
        }
    }
}

// Turns scores into e^(score - top), with top the new maximum; returns what earlier sums are to be scaled with.
static float weigh(float scores[BLOCK], int num_keys, float *top, float *total) {
    float highest = *top, sum = 0.0f;
    for (int j = 0; j < num_keys; j++) highest = scores[j] > highest ? scores[j] : highest;
    for (int j = 0; j < num_keys; j++) sum += scores[j] = exp_of_negative(scores[j] - highest);
    float rescale = exp_of_negative(*top - highest);
    *top = highest;
    *total = *total * rescale + sum;
    return rescale;
}

// o[f] = o[f] * rescale[f] + sum_j weights[f][j] v[j]
static void mix(Vector o[FOLD][VECTORS], const float rescale[FOLD], float weights[FOLD][BLOCK], const float *v,
                int num_keys) {
    for (int first = 0; first < VECTORS; first += CHUNK) {
        int width = VECTORS - first < CHUNK ? VECTORS - first : CHUNK;
        Vector sum[FOLD][CHUNK];
        for (int f = 0; f < FOLD; f++)
            for (int d = 0; d < width; d++) sum[f][d] = o[f][first + d] * rescale[f];
        if (width == CHUNK) {
            for (int j = 0; j < num_keys; j++) {
                const Vector *value = (const Vector *)(v + j * SLOT) + first;
                UNROLL for (int d = 0; d < CHUNK; d++) __builtin_prefetch((const char *)(value + d) + AHEAD);
                UNROLL for (int f = 0; f < FOLD; f++)
                    UNROLL for (int d = 0; d < CHUNK; d++) sum[f][d] += weights[f][j] * value[d];
            }
        } else {
            for (int j = 0; j < num_keys; j++) {
                const Vector *value = (const Vector *)(v + j * SLOT) + first;
                for (int f = 0; f < FOLD; f++)
                    for (int d = 0; d < width; d++) sum[f][d] += weights[f][j] * value[d];
            }
        }
        for (int f = 0; f < FOLD; f++)
            for (int d = 0; d < width; d++) o[f][first + d] = sum[f][d];
    }
}

static void fold_run(State *s, Vector q[HEADS][VECTORS], const float *k, const float *v, int64_t num_keys) {
    float scores[FOLD][BLOCK] = {{0}}, rescale[FOLD];
    for (int64_t first = 0; first < num_keys; first += BLOCK) {
        int count = num_keys - first < BLOCK ? (int)(num_keys - first) : BLOCK;
        for (int h = 0; h < KV_HEADS; h++) {
            int64_t at = first * SLOT + h * HEAD_DIM;
            score((const Vector(*)[VECTORS])(q + h * FOLD), k + at, count, scores);
            for (int f = 0; f < FOLD; f++)
                rescale[f] = weigh(scores[f], count, s->top + h * FOLD + f, s->total + h * FOLD + f);
            mix(s->o + h * FOLD, rescale, scores, v + at, count);
        }
    }
}

static void finish(const State *s, float *o, float *lse) {
    for (int head = 0; head < HEADS; head++) {
        float total = s->total[head] > 0.0f ? s->total[head] : 1.0f; // of a row without keys, whose top is -inf
        for (int d = 0; d < VECTORS; d++) ((Vector *)o)[head * VECTORS + d] = s->o[head][d] / total;
        lse[head] = s->top[head] + logf(total);
    }
}

static void merge(State *s, const State *part) {
    for (int head = 0; head < HEADS; head++) {
        float top = s->top[head] > part->top[head] ? s->top[head] : part->top[head];
        float ours = exp_of_negative(s->top[head] - top), theirs = exp_of_negative(part->top[head] - top);
        for (int d = 0; d < VECTORS; d++)
            s->o[head][d] = s->o[head][d] * ours + part->o[head][d] * theirs;
        s->total[head] = s->total[head] * ours + part->total[head] * theirs;
        s->top[head] = top;
    }
}

// Keys [begin, end) of a row, counted through its runs.
static void attend(State *s, const float *q, float scale, const float *k, const float *v, const int64_t *runs,
                   int64_t num_runs, int64_t begin, int64_t end) {
    Vector scaled[HEADS][VECTORS];
    for (int head = 0; head < HEADS; head++)
        for (int d = 0; d < VECTORS; d++) scaled[head][d] = ((const Vector *)q)[head * VECTORS + d] * scale;
    start(s);
    for (int64_t run = 0, before = 0; run < num_runs; run++) {
        int64_t first = runs[2 * run], length = runs[2 * run + 1] - first;
        int64_t from = begin > before ? begin - before : 0, to = end - before < length ? end - before : length;
        if (from < to) fold_run(s, scaled, k + (first + from) * SLOT, v + (first + from) * SLOT, to - from);
        before += length;
    }
}

// q, o [rows, HEADS, HEAD_DIM]; k, v [slots, KV_HEADS, HEAD_DIM]; lse [rows, HEADS]. The runs of row r are
// runs[2 i], runs[2 i + 1] (begin and end) for i in first_run[r] .. first_run[r + 1] - 1. Returns 0, or 1 when
// there is no memory.
int paged_decode(const float *q, const float *k, const float *v, const int64_t *runs, const int64_t *first_run,
                 int64_t num_rows, float scale, int max_threads, float *o, float *lse) {
    int64_t total = 0;
    for (int64_t i = 0; i < first_run[num_rows]; i++) total += runs[2 * i + 1] - runs[2 * i];
    int threads = total / MIN_SHARE < max_threads ? (int)(total / MIN_SHARE) : max_threads;
    threads = threads < 1 ? 1 : threads;
    // A thread shares at most its first and its last row with others.
    State *parts = aligned_alloc(64, (2 * threads * sizeof(State) + 63) / 64 * 64);
    int64_t *part_rows = malloc(2 * threads * sizeof *part_rows);
    if (!parts || !part_rows) {
        free(parts);
        free(part_rows);
        return 1;
    }
    for (int i = 0; i < 2 * threads; i++) part_rows[i] = -1;
#pragma omp parallel num_threads(threads)
    {
        int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
        int64_t begin = total * me / all, end = total * (me + 1) / all, before = 0;
        State whole;
        for (int64_t row = 0, used = 0; row < num_rows; row++) {
            const int64_t *row_runs = runs + 2 * first_run[row];
            int64_t num_runs = first_run[row + 1] - first_run[row], length = 0;
            for (int64_t i = 0; i < num_runs; i++) length += row_runs[2 * i + 1] - row_runs[2 * i];
            int64_t from = begin > before ? begin - before : 0, to = end - before < length ? end - before : length;
            // A row without keys is the first thread's.
            int mine = from < to || (!length && !me), entire = mine && from == 0 && to == length;
            State *s = entire ? &whole : parts + 2 * me + used;
            if (mine) attend(s, q + row * HEADS * HEAD_DIM, scale, k, v, row_runs, num_runs, from, to);
            if (entire) finish(s, o + row * HEADS * HEAD_DIM, lse + row * HEADS);
            else if (mine) part_rows[2 * me + used++] = row;
            before += length;
        }
    }
    for (int i = 0; i < 2 * threads; i++) {
        if (part_rows[i] < 0) continue;
        int64_t row = part_rows[i];
        for (int other = i + 1; other < 2 * threads; other++) {
            if (part_rows[other] != row) continue;
            merge(parts + i, parts + other);
            part_rows[other] = -1;
        }
        finish(parts + i, o + row * HEADS * HEAD_DIM, lse + row * HEADS);
    }
    free(parts);
    free(part_rows);
    return 0;
}
