/* Fast part of fedpriv/mechanisms/gaussian.py: rounds value plus noise to whole steps if float64 can decide.
 *
 * Three passes over a block that stays in the cache, of which the first and last are done four numbers at a time. Any
 * order of operations is right: a result that an error in the last places could change is reported as undecided.
 */
#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __FMA__
#define MULTIPLY_ADD(a, b, c) fma(a, b, c)
#else
#define MULTIPLY_ADD(a, b, c) ((c) + (a) * (b))
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

/* Round values plus noise to whole steps; write which positions are undecided and return how many. */
size_t round_noise(const struct release *release, const uint64_t *words, const double *values, size_t size,
                   int64_t *rounded, int64_t *positions) {
    uint64_t signs[BLOCK], rows[BLOCK], undecided[BLOCK];
    double offsets[BLOCK], noise[BLOCK];
    size_t count = 0;
    for (size_t start = 0; start < size; start += BLOCK) {
        const size_t length = size - start < BLOCK ? size - start : BLOCK;
        look_up(release, words + start, length, signs, rows, offsets, undecided);
        evaluate(release->table, rows, offsets, length, noise);
        if (add(release, values + start, signs, noise, length, rounded + start, undecided))
            for (size_t i = 0; i < length; i++)
                if (undecided[i])
                    positions[count++] = (int64_t)(start + i);
    }
    return count;
}
