/* Fast part of fedpriv/mechanisms/gaussian.py: rounds value plus noise to whole steps if floating point can decide.
 *
 * Most numbers are decided by float32 and the first 32 bits of their words, most others by float64 and all 64 bits, and
 * the rest are reported. Passes over a block stay in the cache; all but the look-ups are done several numbers at a time.
 * Any order of operations is right: a result that an error in the last places could change is undecided.
 */
#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __FMA__
#define MULTIPLY_ADD(a, b, c) fma(a, b, c)
#define MULTIPLY_ADD_FLOAT(a, b, c) fmaf(a, b, c)
#else
#define MULTIPLY_ADD(a, b, c) ((c) + (a) * (b))
#define MULTIPLY_ADD_FLOAT(a, b, c) ((c) + (a) * (b))
#endif

#define BLOCK 256
#define NONE (~(uint64_t)0)
#define SIGN ((uint64_t)1 << 63)
#define ONE ((uint64_t)1023 << 52) /* the bits of 1.0 */

/* Constants of all calls, from fedpriv/mechanisms/gaussian.py: table of polynomials and numbers of one release. */
struct release {
    const double *table; /* 8 to a row, of which 6 are coefficients, the constant one first */
    uint64_t first;      /* least exponent with rows */
    uint64_t split;      /* log2 of the rows to an exponent */
    double middle;       /* of an interval's fractions */
    double steps;        /* most steps on either side */
    double inverse;      /* 1 / grid */
    double ratio;        /* stddev / grid */
    double edge;         /* how far from an integer a sum may be and be decided */
    const float *coarse; /* table for float32: 4 coefficients to a row, the constant one first */
    uint64_t width;      /* log2 of the tails of 31 bits to a row of it */
    uint64_t skipped;    /* rows for the smallest tails, which float32 does not decide */
    double coarse_edge;  /* `edge` for float32; 0 if float32 is not used */
    double level;        /* most steps in absolute value of a released number */
    double grid;
};

static inline double as_double(uint64_t bits) {
    double number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

static inline uint64_t as_bits(double number) {
    uint64_t bits;
    memcpy(&bits, &number, sizeof bits);
    return bits;
}

/* Natural numbers below 2^52, and integers within 2^51, by the bits of a double; unlike casts, four at a time. */
static inline double double_of(uint64_t natural) { return as_double(natural | as_bits(0x1p52)) - 0x1p52; }
static inline uint64_t integer_of(double whole) { return as_bits(whole + 0x1.8p52) - as_bits(0x1.8p52); }

/* Of each word: the sign of its noise, and the row of its tail probability; undecided if off the table. */
static void look_up(const struct release *release, const uint64_t *restrict words, size_t size,
                    uint64_t *restrict signs, uint64_t *restrict rows, double *restrict offsets,
                    uint64_t *restrict undecided) {
    const uint64_t first = release->first, fraction = 52 - release->split;
    const double middle = release->middle;
    for (size_t i = 0; i < size; i++) {
        const uint64_t positive = (uint64_t)((int64_t)words[i] >> 63), tail = words[i] ^ positive;
        const uint64_t bits = as_bits(double_of(tail >> 32) * 0x1p32 + double_of(tail & 0xffffffff));
        const uint64_t tiny = tail >> first ? 0 : NONE;
        signs[i] = ~positive & SIGN;
        rows[i] = ((bits - ONE - (first << 52)) >> fraction) & ~tiny;
        offsets[i] = as_double((bits & (((uint64_t)1 << fraction) - 1)) | ONE) - middle;
        undecided[i] = tiny;
    }
}

static void evaluate(const double *restrict table, const uint64_t *restrict rows, const double *restrict offsets,
                     size_t size, double *restrict noise) {
    for (size_t i = 0; i < size; i++) {
        const double *c = table + 8 * rows[i], x = offsets[i];
        double sum = MULTIPLY_ADD(c[5], x, c[4]);
        sum = MULTIPLY_ADD(sum, x, c[3]);
        sum = MULTIPLY_ADD(sum, x, c[2]);
        sum = MULTIPLY_ADD(sum, x, c[1]);
        noise[i] = MULTIPLY_ADD(sum, x, c[0]);
    }
}

/* Whole steps of value and noise; whether any is undecided. */
static uint64_t add(const struct release *release, const double *restrict values, const uint64_t *restrict signs,
                    const double *restrict noise, size_t size, int64_t *restrict rounded, uint64_t *restrict undecided) {
    const double inverse = release->inverse, ratio = release->ratio, most = release->steps, edge = release->edge;
    uint64_t any = 0;
    for (size_t i = 0; i < size; i++) {
        double steps = fabs(values[i]) <= DBL_MAX ? values[i] * inverse : 0.0;
        steps = steps < -most ? -most : steps;
        steps = steps > most ? most : steps;
        const double whole = rint(steps), sum = (steps - whole) + ratio * as_double(as_bits(noise[i]) ^ signs[i]);
        const double shift = rint(sum), high = rint(whole * 0x1p-32), low = (whole - high * 0x1p32) + shift;
        rounded[i] = (int64_t)((integer_of(high) << 32) + integer_of(low));
        undecided[i] |= fabs(sum - shift) < edge ? 0 : NONE;
        any |= undecided[i];
    }
    return any;
}

/* Decide in float64 what is undecided of a block, one number after the other; report what stays undecided. */
static size_t decide_rest(const struct release *release, const uint64_t *words, const double *values,
                          const uint32_t *undecided, size_t size, int64_t *rounded, int64_t *positions) {
    size_t count = 0;
    for (size_t i = 0; i < size; i++)
        if (undecided[i]) {
            uint64_t sign, row, open;
            double offset, noise;
            look_up(release, words + i, 1, &sign, &row, &offset, &open);
            evaluate(release->table, &row, &offset, 1, &noise);
            if (add(release, values + i, &sign, &noise, 1, rounded + i, &open))
                positions[count++] = (int64_t)i;
        }
    return count;
}

/* Normal numbers from the first halves of words; undecided near zero tails. */
static void coarse_noise(const struct release *release, const uint64_t *restrict words, size_t size,
                         float *restrict noise, uint32_t *restrict undecided) {
    uint32_t rows[BLOCK], signs[BLOCK];
    float offsets[BLOCK];
    const uint32_t width = (uint32_t)release->width, skipped = (uint32_t)release->skipped;
    const int32_t middle = (int32_t)1 << (width - 1);
    const float *restrict table = release->coarse;
    for (size_t i = 0; i < size; i++) {
        const uint32_t half = (uint32_t)(words[i] >> 32), positive = (uint32_t)((int32_t)half >> 31);
        const uint32_t tail = half ^ positive;
        signs[i] = ~positive & ((uint32_t)1 << 31);
        rows[i] = tail >> width;
        offsets[i] = (float)((int32_t)(tail & (((uint32_t)1 << width) - 1)) - middle);
        undecided[i] = rows[i] < skipped ? ~(uint32_t)0 : 0;
    }
    for (size_t i = 0; i < size; i++) {
        const float *c = table + 4 * (size_t)rows[i], x = offsets[i];
        float sum = MULTIPLY_ADD_FLOAT(c[3], x, c[2]);
        sum = MULTIPLY_ADD_FLOAT(sum, x, c[1]);
        noise[i] = MULTIPLY_ADD_FLOAT(sum, x, c[0]);
    }
    for (size_t i = 0; i < size; i++) {
        uint32_t bits;
        memcpy(&bits, &noise[i], sizeof bits);
        bits ^= signs[i];
        memcpy(&noise[i], &bits, sizeof bits);
    }
}

/* The same as `round_noise` for one block, by float64 alone. */
static size_t round_block(const struct release *release, const uint64_t *words, const double *values, size_t size,
                          int64_t *rounded, int64_t *positions) {
    uint64_t signs[BLOCK], rows[BLOCK], undecided[BLOCK];
    double offsets[BLOCK], noise[BLOCK];
    size_t count = 0;
    look_up(release, words, size, signs, rows, offsets, undecided);
    evaluate(release->table, rows, offsets, size, noise);
    if (add(release, values, signs, noise, size, rounded, undecided))
        for (size_t i = 0; i < size; i++)
            if (undecided[i])
                positions[count++] = (int64_t)i;
    return count;
}

static size_t round_block_coarsely(const struct release *release, const uint64_t *words, const double *restrict values,
                                   size_t size, int64_t *restrict rounded, int64_t *positions) {
    uint32_t undecided[BLOCK], any = 0;
    float noise[BLOCK];
    const double inverse = release->inverse;
    const float ratio = (float)release->ratio, edge = (float)release->coarse_edge;
    coarse_noise(release, words, size, noise, undecided);
    for (size_t i = 0; i < size; i++) {
        const double steps = values[i] * inverse, whole = rint(steps);
        const float sum = (float)(steps - whole) + ratio * noise[i], shift = rintf(sum);
        rounded[i] = (int64_t)integer_of(whole + (double)shift);
        undecided[i] |= (fabsf(sum - shift) < edge) & (fabs(steps) < 0x1p50) ? 0 : ~(uint32_t)0;
        any |= undecided[i];
    }
    return any ? decide_rest(release, words, values, undecided, size, rounded, positions) : 0;
}

/* Round values plus noise to whole steps; write which positions are undecided and return how many. */
size_t round_noise(const struct release *release, const uint64_t *words, const double *values, size_t size,
                   int64_t *rounded, int64_t *positions) {
    size_t count = 0;
    for (size_t start = 0; start < size; start += BLOCK) {
        const size_t length = size - start < BLOCK ? size - start : BLOCK;
        const size_t found = (release->coarse_edge > 0.0 ? round_block_coarsely : round_block)(
            release, words + start, values + start, length, rounded + start, positions + count);
        for (size_t i = 0; i < found; i++)
            positions[count++] += (int64_t)start;
    }
    return count;
}

/* The released numbers of steps, clamped after the noise. */
static inline double released_number(const struct release *release, int64_t steps) {
    double level = (double)steps;
    level = level < -release->level ? -release->level : level;
    level = level > release->level ? release->level : level;
    return level * release->grid;
}

/* Release values plus noise: multiples of the grid; otherwise as `round_noise`. */
size_t release_doubles(const struct release *release, const uint64_t *words, const double *values, size_t size,
                       double *restrict released, int64_t *positions) {
    int64_t rounded[BLOCK];
    size_t count = 0;
    for (size_t start = 0; start < size; start += BLOCK) {
        const size_t length = size - start < BLOCK ? size - start : BLOCK;
        const size_t found = round_noise(release, words + start, values + start, length, rounded, positions + count);
        for (size_t i = 0; i < found; i++)
            positions[count++] += (int64_t)start;
        for (size_t i = 0; i < length; i++)
            released[start + i] = released_number(release, rounded[i]);
    }
    return count;
}

/* The same for float32 values; the coarse part is all in float32. */
size_t release_floats(const struct release *release, const uint64_t *words, const float *restrict values, size_t size,
                      float *restrict released, int64_t *positions) {
    const float inverse = (float)release->inverse, ratio = (float)release->ratio, grid = (float)release->grid;
    const float edge = (float)release->coarse_edge, most = (float)release->level;
    uint32_t undecided[BLOCK];
    float noise[BLOCK];
    size_t count = 0;
    for (size_t start = 0; start < size; start += BLOCK) {
        const size_t length = size - start < BLOCK ? size - start : BLOCK;
        const float *restrict some = values + start;
        float *restrict out = released + start;
        uint32_t any = 0;
        coarse_noise(release, words + start, length, noise, undecided);
        for (size_t i = 0; i < length; i++) {
            const float steps = some[i] * inverse, whole = rintf(steps);
            const float sum = (steps - whole) + ratio * noise[i], shift = rintf(sum);
            float level = whole + shift + 0.0f; /* no negative zero */
            level = level < -most ? -most : level;
            level = level > most ? most : level;
            out[i] = level * grid;
            undecided[i] |= (fabsf(sum - shift) < edge) & (fabsf(steps) < 0x1p22f) ? 0 : ~(uint32_t)0;
            any |= undecided[i];
        }
        for (size_t i = 0; any && i < length; i++)
            if (undecided[i]) {
                const double value = (double)some[i];
                int64_t rounded, position;
                if (decide_rest(release, words + start + i, &value, &undecided[i], 1, &rounded, &position))
                    positions[count++] = (int64_t)(start + i);
                out[i] = (float)released_number(release, rounded);
            }
    }
    return count;
}

/* Words of a stream by key and position; see fedpriv/philox.c. */
typedef void make_words(uint64_t key0, uint64_t key1, uint64_t position, size_t size, uint64_t *words);

/* Where the words of a row of values begin. */
struct stream {
    uint64_t key[2], position;
};

/* Release rows of values, float64 or float32, each with its own stream, whose words never leave the cache. */
size_t release_rows(const struct release *release, make_words *make, const struct stream *streams, size_t rows,
                    size_t size, size_t doubles, const void *values, void *released, int64_t *positions) {
    uint64_t words[BLOCK];
    size_t count = 0;
    for (size_t row = 0; row < rows; row++)
        for (size_t start = 0; start < size; start += BLOCK) {
            const size_t length = size - start < BLOCK ? size - start : BLOCK, at = row * size + start;
            const struct stream *stream = streams + row;
            make(stream->key[0], stream->key[1], stream->position + start, length, words);
            const size_t found =
                doubles ? release_doubles(release, words, (const double *)values + at, length, (double *)released + at,
                                          positions + count)
                        : release_floats(release, words, (const float *)values + at, length, (float *)released + at,
                                         positions + count);
            for (size_t i = 0; i < found; i++)
                positions[count++] += (int64_t)at;
        }
    return count;
}
