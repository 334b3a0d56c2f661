/* One client's step in two passes over its vectors: norms, then message, memory and sum.
 *
 * Every element is computed by the operations, and the roundings, of fedpriv/engines/step.py. Only norms are added in
 * another order, in float64.
 */
#include <math.h>
#include <stddef.h>

#ifdef __FMA__
#define MULTIPLY_ADD(a, b, c) fmaf(a, b, c)
#else
#define MULTIPLY_ADD(a, b, c) ((c) + (a) * (b))
#endif

#define LANES 32
/* Beyond these, float32 products lose the bound; see fedpriv/bounding.py. */
#define HUGE_NORM 0x1p96
#define TINY_SCALE 0x1p-96

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
    for (; i + LANES <= size; i += LANES)
        for (size_t k = 0; k < LANES; k++) {
            double u = (double)signal[i + k], r = (double)(signal[i + k] - kept * memory[i + k]);
            first[k] += u * u;
            second[k] += r * r;
        }
    for (; i < size; i++) {
        double u = (double)signal[i], r = (double)(signal[i] - kept * memory[i]);
        first[0] += u * u;
        second[0] += r * r;
    }
    *own = sqrt(total(first));
    *residual = sqrt(total(second));
}

/* The scale of a bounded map (four figures of fedpriv/bounding.py) for a norm; 0 if it is not an ordinary number. */
static float scale_for(double norm, const double *map) {
    double length = norm > 1e-300 ? norm : 1e-300;
    double scale = map[0] / (map[1] + length);
    if (map[2] < scale)
        scale = map[2];
    if (map[3] / length < scale)
        scale = map[3] / length;
    return norm < HUGE_NORM && scale >= TINY_SCALE ? (float)scale : 0.0f;
}

/* sum += message = scale * signal, rounded to the grid of `shift`. Returns whether anything was done. */
int add_bounded(const float *restrict signal, double *restrict sum, size_t size, const double *map, double shift,
                double *own) {
    *own = norm_of(signal, size);
    float scale = scale_for(*own, map);
    if (scale == 0.0f)
        return 0;
    for (size_t i = 0; i < size; i++)
        sum[i] += ((double)(scale * signal[i]) + shift) - shift;
    return 1;
}

/* message = scale * (signal - kept * memory); memory <- forget * kept * memory + beta * message; sum += message, rounded
 * to the grid. `kept` and `forget` are 1 without damping. Returns whether anything was done. */
int feed_back(const float *restrict signal, float *restrict memory, double *restrict sum, size_t size, float kept,
              float forget, float beta, const double *map, double shift, double *own) {
    double residual;
    norms_of(signal, memory, size, kept, own, &residual);
    float scale = scale_for(residual, map);
    if (scale == 0.0f)
        return 0;
    for (size_t i = 0; i < size; i++) {
        float old = kept * memory[i];
        float message = scale * (signal[i] - old);
        memory[i] = MULTIPLY_ADD(beta, message, forget * old);
        sum[i] += ((double)message + shift) - shift;
    }
    return 1;
}
