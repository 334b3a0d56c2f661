/* One client's step in two passes over its vectors: the norm of the residual, then message, memory and sum.
 *
 * Every element is computed by the operations, and the roundings, of fedpriv/engines/step.py. Only the norm is added in
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

/* Squared length of signal - kept * memory; memory may be NULL. */
double squared_residual(const float *restrict signal, const float *restrict memory, size_t size, float kept) {
    double lanes[LANES] = {0.0};
    size_t i = 0;
    for (; i + LANES <= size; i += LANES)
        for (size_t k = 0; k < LANES; k++) {
            float old = memory ? kept * memory[i + k] : 0.0f;
            double residual = (double)(signal[i + k] - old);
            lanes[k] += residual * residual;
        }
    double sum = 0.0;
    for (; i < size; i++) {
        float old = memory ? kept * memory[i] : 0.0f;
        double residual = (double)(signal[i] - old);
        sum += residual * residual;
    }
    for (size_t k = 0; k < LANES; k++)
        sum += lanes[k];
    return sum;
}

/* message = scale * (signal - kept * memory); memory <- forget * kept * memory + beta * message; sum += message, rounded
 * to the grid of `shift`. `kept` and `forget` are 1 without damping. */
void feed_back(const float *restrict signal, float *restrict memory, double *restrict sum, size_t size, float kept,
               float forget, float scale, float beta, double shift) {
    for (size_t i = 0; i < size; i++) {
        float old = kept * memory[i];
        float message = scale * (signal[i] - old);
        memory[i] = MULTIPLY_ADD(beta, message, forget * old);
        sum[i] += ((double)message + shift) - shift;
    }
}

/* The same without memory. */
void add_bounded(const float *restrict signal, double *restrict sum, size_t size, float scale, double shift) {
    for (size_t i = 0; i < size; i++)
        sum[i] += ((double)(scale * signal[i]) + shift) - shift;
}
