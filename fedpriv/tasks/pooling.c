/* Maximum pooling of 2 x 2 windows and its derivative, float32, with the results of torch to the bit.
 *
 * As in torch, a window's first maximum counts, or its last NaN. The last row or column of an odd side is in no window.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define LANES 8

/* A loop of a constant number of windows is done at once. */
static inline __attribute__((always_inline)) void pool_windows(const float *restrict upper, const float *restrict lower,
                                                               size_t count, float *restrict values,
                                                               int32_t *restrict places) {
    for (size_t i = 0; i < count; i++) {
        const float a = upper[2 * i], b = upper[2 * i + 1], c = lower[2 * i], d = lower[2 * i + 1];
        const int32_t second = (b > a) | (b != b);
        const float two = second ? b : a;
        const int32_t third = (c > two) | (c != c);
        const float three = third ? c : two;
        const int32_t fourth = (d > three) | (d != d);
        values[i] = fourth ? d : three;
        places[i] = fourth ? 3 : third ? 2 : second;
    }
}

/* values, places: [planes, height / 2, width / 2], of inputs [planes, height, width]; a place is 0 to 3 in a window. */
void pool(const float *inputs, size_t planes, size_t height, size_t width, float *values, int32_t *places) {
    const size_t rows = height / 2, columns = width / 2;
    for (size_t p = 0; p < planes; p++)
        for (size_t row = 0; row < rows; row++) {
            const float *upper = inputs + (p * height + 2 * row) * width, *lower = upper + width;
            size_t i = 0, at = (p * rows + row) * columns;
            for (; i + LANES <= columns; i += LANES)
                pool_windows(upper + 2 * i, lower + 2 * i, LANES, values + at + i, places + at + i);
            pool_windows(upper + 2 * i, lower + 2 * i, columns - i, values + at + i, places + at + i);
        }
}

/* slopes [planes, height, width] by the inputs, from those by the values. */
void spread(const float *value_slopes, const int32_t *places, size_t planes, size_t height, size_t width,
            float *slopes) {
    const size_t rows = height / 2, columns = width / 2, offsets[4] = {0, 1, width, width + 1};
    memset(slopes, 0, planes * height * width * sizeof *slopes);
    for (size_t p = 0; p < planes; p++)
        for (size_t row = 0; row < rows; row++) {
            float *restrict upper = slopes + (p * height + 2 * row) * width;
            const size_t at = (p * rows + row) * columns;
            for (size_t i = 0; i < columns; i++) /* no negative zero, as in a sum from 0 */
                upper[2 * i + offsets[places[at + i] & 3]] = value_slopes[at + i] + 0.0f;
        }
}
