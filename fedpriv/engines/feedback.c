/* One client's step in two passes over its vectors: norms, then message, memory and sum.
 *
 * Every element is computed by the operations, and the roundings, of fedpriv/engines/in_place.py. Only norms are added in
 * another order, in float64. The signal's norm, which is only reported, is added in short runs of float32. Arithmetic
 * limits the second pass and memory the first, so the second pass also fetches the next client's memory for the first.
 */
#include <math.h>
#include <stddef.h>

#ifdef __FMA__
#define MULTIPLY_ADD(a, b, c) fmaf(a, b, c)
#else
#define MULTIPLY_ADD(a, b, c) ((c) + (a) * (b))
#endif
#ifdef __GNUC__
#define FETCH(address) __builtin_prefetch(address, 1, 2)
#else
#define FETCH(address) ((void)0)
#endif

#define LANES 32
#define RUN 4      /* squares that are added in float32 */
#define LINE 16    /* floats fetched at once */
#define AHEAD 2048 /* floats between the reads and the fetches */
/* Beyond these, float32 products lose the bound; see fedpriv/bounding.py. */
#define HUGE_NORM 0x1p96
#define TINY_SCALE 0x1p-96
/* Mean squares outside of these may have over- or underflowed in float32. */
#define MIN_SQUARE 0x1p-90
#define MAX_SQUARE 0x1p120

/* The common parameters of a round's clients; fedpriv/engines/native.py has the same fields. */
struct round_parameters {
    double *sum;
    size_t size;
    double map[4]; /* parameters of fedpriv/bounding.py */
    double shift;
    float forget; /* 1 - damping */
    float beta;
    float number; /* of the round */
};

static double total(const double *lanes) {
    double sum = 0.0;
    for (size_t k = 0; k < LANES; k++)
        sum += lanes[k];
    return sum;
}

static double norm_of(const float *restrict signal, size_t size) {
    double lanes[LANES] = {0.0};
    size_t i = 0;
    for (; i + LANES <= size; i += LANES)
        for (size_t k = 0; k < LANES; k++)
            lanes[k] += (double)signal[i + k] * (double)signal[i + k];
    for (; i < size; i++)
        lanes[0] += (double)signal[i] * (double)signal[i];
    return sqrt(total(lanes));
}

/* Norms of signal and of signal - kept * memory. */
static void norms_of(const float *restrict signal, const float *restrict memory, size_t size, float kept, double *own,
                     double *residual) {
    double first[LANES] = {0.0}, second[LANES] = {0.0};
    size_t i = 0;
    for (; i + RUN * LANES <= size; i += RUN * LANES) {
        float run[LANES] = {0.0f};
        for (size_t j = 0; j < RUN * LANES; j += LINE)
            FETCH(memory + i + j + AHEAD); /* past the end is allowed */
        for (size_t j = 0; j < RUN; j++)
            for (size_t k = 0; k < LANES; k++) {
                float u = signal[i + j * LANES + k];
                double r = (double)(u - kept * memory[i + j * LANES + k]);
                run[k] += u * u;
                second[k] += r * r;
            }
        for (size_t k = 0; k < LANES; k++)
            first[k] += (double)run[k];
    }
    for (; i < size; i++) {
        double u = (double)signal[i], r = (double)(signal[i] - kept * memory[i]);
        first[0] += u * u;
        second[0] += r * r;
    }
    double square = total(first);
    int in_range = square >= MIN_SQUARE * (double)size && square <= MAX_SQUARE;
    *own = in_range ? sqrt(square) : norm_of(signal, size);
    *residual = sqrt(total(second));
}

/* The scale of a bounded map for a norm; 0 if it is not a normal number. */
static float scale_for(double norm, const double *map) {
    double length = norm > 1e-300 ? norm : 1e-300;
    double scale = map[0] / (map[1] + length);
    if (map[2] < scale)
        scale = map[2];
    if (map[3] / length < scale)
        scale = map[3] / length;
    return norm < HUGE_NORM && scale >= TINY_SCALE ? (float)scale : 0.0f;
}

/* sum += message = scale * signal, rounded to the grid of `shift`. Returns the signal's norm; does nothing and returns
 * -1 if the norm is not a normal number. */
double add_bounded(const struct round_parameters *round, const float *restrict signal) {
    double *restrict sum = round->sum;
    const double shift = round->shift, own = norm_of(signal, round->size);
    const float scale = scale_for(own, round->map);
    if (scale == 0.0f)
        return -1.0;
    for (size_t i = 0; i < round->size; i++)
        sum[i] += ((double)(scale * signal[i]) + shift) - shift;
    return own;
}

/* The damping of a memory since the round of its last change, which is null if it is not counted. */
static float kept_in(const struct round_parameters *round, const float *updated) {
    return round->forget < 1.0f && updated ? powf(round->forget, round->number - 1.0f - *updated) : 1.0f;
}

/* message = scale * (signal - kept * memory); memory <- forget * kept * memory + beta * message; sum += message, rounded
 * to the grid. `kept` is the damping since the round `updated`; both it and `forget` are 1 without damping. `next` is
 * the next client's memory, to be fetched, or this client's. Returns as add_bounded does. */
double feed_back(const struct round_parameters *round, const float *restrict signal, float *restrict memory,
                 float *updated, const float *next) {
    double own, residual;
    double *restrict sum = round->sum;
    const size_t size = round->size;
    const double shift = round->shift;
    const float forget = round->forget, beta = round->beta, kept = kept_in(round, updated);
    norms_of(signal, memory, size, kept, &own, &residual);
    const float scale = scale_for(residual, round->map);
    if (scale == 0.0f)
        return -1.0;
    size_t i = 0;
    for (; i + LINE <= size; i += LINE) {
        FETCH(next + i);
        for (size_t k = 0; k < LINE; k++) {
            float old = kept * memory[i + k];
            float message = scale * (signal[i + k] - old);
            memory[i + k] = MULTIPLY_ADD(beta, message, forget * old);
            sum[i + k] += ((double)message + shift) - shift;
        }
    }
    for (; i < size; i++) {
        float old = kept * memory[i];
        float message = scale * (signal[i] - old);
        memory[i] = MULTIPLY_ADD(beta, message, forget * old);
        sum[i] += ((double)message + shift) - shift;
    }
    if (updated)
        *updated = round->number;
    return own;
}

/* add_bounded for `count` signals, the rows of a matrix; their norms or -1 go to `norms`. */
void add_bounded_rows(const struct round_parameters *round, const float *signals, size_t count, double *norms) {
    for (size_t k = 0; k < count; k++)
        norms[k] = add_bounded(round, signals + k * round->size);
}

/* feed_back for `count` signals, the rows of a matrix; `updated` is null for none. */
void feed_back_rows(const struct round_parameters *round, const float *signals, size_t count, float *const *memories,
                    float *const *updated, double *norms) {
    for (size_t k = 0; k < count; k++) {
        const float *next = memories[k + 1 < count ? k + 1 : k];
        norms[k] = feed_back(round, signals + k * round->size, memories[k], updated ? updated[k] : NULL, next);
    }
}

/* For messages that get noise before they are sent: rows of signals become bounded messages, as in the functions above.
 * `memories` is null for none. A row without a normal norm is left as it is; its norm is -1. */
void bound_rows(const struct round_parameters *round, float *signals, size_t count, float *const *memories,
                float *const *updated, double *norms) {
    const size_t size = round->size;
    for (size_t k = 0; k < count; k++) {
        float *restrict signal = signals + k * size;
        const float *restrict memory = memories ? memories[k] : NULL;
        const float kept = kept_in(round, memory && updated ? updated[k] : NULL);
        double own, residual;
        if (memory)
            norms_of(signal, memory, size, kept, &own, &residual);
        else
            own = residual = norm_of(signal, size);
        const float scale = scale_for(residual, round->map);
        norms[k] = scale == 0.0f ? -1.0 : own;
        if (scale != 0.0f && memory)
            for (size_t i = 0; i < size; i++)
                signal[i] = scale * (signal[i] - kept * memory[i]);
        else if (scale != 0.0f)
            for (size_t i = 0; i < size; i++)
                signal[i] = scale * signal[i];
    }
}

/* Adds the rows of `sent` to the sum, and those of `remembered` to the memories, unless `memories` is null. */
void add_sent_rows(const struct round_parameters *round, const float *sent, const float *remembered, size_t count,
                   float *const *memories, float *const *updated) {
    double *restrict sum = round->sum;
    const size_t size = round->size;
    const double shift = round->shift;
    const float forget = round->forget, beta = round->beta;
    for (size_t k = 0; k < count; k++) {
        const float *restrict message = sent + k * size;
        for (size_t i = 0; i < size; i++)
            sum[i] += ((double)message[i] + shift) - shift;
        if (!memories)
            continue;
        float *restrict memory = memories[k];
        const float *restrict own = remembered + k * size;
        const float kept = kept_in(round, updated ? updated[k] : NULL);
        for (size_t i = 0; i < size; i++)
            memory[i] = MULTIPLY_ADD(beta, own[i], forget * (kept * memory[i]));
        if (updated)
            *updated[k] = round->number;
    }
}
