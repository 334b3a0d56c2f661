/* Maximum pooling of 2 x 2 windows with ReLU, and its derivative, float32, with the results of torch to the bit.
 *
 * As in torch, a window's first maximum counts, or its last NaN, and ReLU keeps NaN and the sign of zero. The last row
 * or column of an odd side is in no window.
 * Images have channels outermost, [planes, height, width], or innermost, [images, height, width, channels].
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define LANES 8
#define NOWHERE 4 /* ReLU took the window's maximum away */
#define INLINE static inline __attribute__((always_inline))

/* Windows at `count` places; the left and right columns of a window are `right` floats apart, and windows `step`. A
 * loop with constants is done at once. */
INLINE void pool_windows(const float *restrict upper, const float *restrict lower, size_t right, size_t step,
                         size_t count, float *restrict values, int32_t *restrict places) {
    for (size_t i = 0; i < count; i++) {
        const float a = upper[step * i], b = upper[step * i + right];
        const float c = lower[step * i], d = lower[step * i + right];
        const int32_t second = (b > a) | (b != b);
        const float two = second ? b : a;
        const int32_t third = (c > two) | (c != c);
        const float three = third ? c : two;
        const int32_t fourth = (d > three) | (d != d);
        const float most = fourth ? d : three;
        values[i] = most < 0.0f ? 0.0f : most;
        places[i] = most <= 0.0f ? NOWHERE : fourth ? 3 : third ? 2 : second;
    }
}

/* Spreads the slopes of `count` windows, at most LANES, over their four numbers; no negative zero, as in a sum from 0.
 * Masks of bits, as compilers do not turn a choice between two floats into vectors here. */
INLINE void spread_windows(const float *slopes, const int32_t *places, size_t right, size_t step, size_t count,
                           float *upper, float *lower) {
    int32_t bits[LANES], found[4][LANES];
    float given[LANES];
    for (size_t i = 0; i < count; i++)
        given[i] = slopes[i] + 0.0f;
    memcpy(bits, given, sizeof bits);
    for (int32_t k = 0; k < 4; k++)
        for (size_t i = 0; i < count; i++)
            found[k][i] = bits[i] & -(int32_t)(places[i] == k);
    for (size_t i = 0; i < count; i++) {
        memcpy(upper + step * i, &found[0][i], sizeof *upper);
        memcpy(upper + step * i + right, &found[1][i], sizeof *upper);
        memcpy(lower + step * i, &found[2][i], sizeof *upper);
        memcpy(lower + step * i + right, &found[3][i], sizeof *upper);
    }
}

/* Calls `use(first, size)` for blocks of windows, with a constant size if there are enough. The last block may overlap
 * the one before; it writes the same results again. */
#define IN_BLOCKS(use, count)                                                                                          \
    if ((count) >= LANES) {                                                                                            \
        size_t i = 0;                                                                                                  \
        for (; i + LANES <= (count); i += LANES)                                                                       \
            use(i, LANES);                                                                                             \
        if (i < (count))                                                                                               \
            use((count) - LANES, LANES);                                                                               \
    } else if ((count) >= LANES / 2) {                                                                                 \
        use(0, LANES / 2);                                                                                             \
        use((count) - LANES / 2, LANES / 2);                                                                           \
    } else {                                                                                                           \
        use(0, count);                                                                                                 \
    }

/* values, places: [planes, height / 2, width / 2], of inputs [planes, height, width]; a place is 0 to 3 in a window, or
 * NOWHERE. */
void pool(const float *inputs, size_t planes, size_t height, size_t width, float *values, int32_t *places) {
    const size_t rows = height / 2, columns = width / 2, all = planes * rows * columns;
    const float *end = inputs + planes * height * width;
    for (size_t p = 0; p < planes; p++)
        for (size_t row = 0; row < rows; row++) {
            const float *upper = inputs + (p * height + 2 * row) * width, *lower = upper + width;
            const size_t at = (p * rows + row) * columns;
            if (columns < LANES && all - at >= LANES && end - lower >= 2 * LANES) {
                /* Beyond the row are numbers that do not count, and results that the next rows replace. */
                pool_windows(upper, lower, 1, 2, LANES, values + at, places + at);
                continue;
            }
#define POOL(first, size)                                                                                              \
    pool_windows(upper + 2 * (first), lower + 2 * (first), 1, 2, size, values + at + (first), places + at + (first))
            IN_BLOCKS(POOL, columns)
        }
}

/* slopes [planes, height, width] by the inputs, from those by the values. */
void spread(const float *value_slopes, const int32_t *places, size_t planes, size_t height, size_t width,
            float *slopes) {
    const size_t rows = height / 2, columns = width / 2;
    if (height % 2 || width % 2)
        memset(slopes, 0, planes * height * width * sizeof *slopes);
    for (size_t p = 0; p < planes; p++)
        for (size_t row = 0; row < rows; row++) {
            float *upper = slopes + (p * height + 2 * row) * width, *lower = upper + width;
            const size_t at = (p * rows + row) * columns;
            const float *found = value_slopes + at;
#define SPREAD(first, size)                                                                                            \
    spread_windows(found + (first), places + at + (first), 1, 2, size, upper + 2 * (first), lower + 2 * (first))
            IN_BLOCKS(SPREAD, columns)
        }
}

/* As `pool`, with channels innermost: inputs [images, height, width, channels]. */
void pool_inner(const float *inputs, size_t images, size_t height, size_t width, size_t channels, float *values,
                int32_t *places) {
    const size_t rows = height / 2, columns = width / 2;
    for (size_t p = 0; p < images; p++)
        for (size_t row = 0; row < rows; row++)
            for (size_t column = 0; column < columns; column++) {
                const float *upper = inputs + ((p * height + 2 * row) * width + 2 * column) * channels;
                const float *lower = upper + width * channels;
                const size_t at = ((p * rows + row) * columns + column) * channels;
#define POOL_INNER(first, size)                                                                                        \
    pool_windows(upper + (first), lower + (first), channels, 1, size, values + at + (first), places + at + (first))
                IN_BLOCKS(POOL_INNER, channels)
            }
}

/* As `spread`, with channels innermost. */
void spread_inner(const float *value_slopes, const int32_t *places, size_t images, size_t height, size_t width,
                  size_t channels, float *slopes) {
    const size_t rows = height / 2, columns = width / 2;
    if (height % 2 || width % 2)
        memset(slopes, 0, images * height * width * channels * sizeof *slopes);
    for (size_t p = 0; p < images; p++)
        for (size_t row = 0; row < rows; row++)
            for (size_t column = 0; column < columns; column++) {
                float *upper = slopes + ((p * height + 2 * row) * width + 2 * column) * channels;
                float *lower = upper + width * channels;
                const size_t at = ((p * rows + row) * columns + column) * channels;
                const float *found = value_slopes + at;
#define SPREAD_INNER(first, size)                                                                                      \
    spread_windows(found + (first), places + at + (first), channels, 1, size, upper + (first), lower + (first))
                IN_BLOCKS(SPREAD_INNER, channels)
            }
}
