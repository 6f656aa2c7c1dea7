/* derivatives.h - proving derivatives: reverse mode, tangents, and gradients through tangents, against
 * differences.
 *
 * A subject is a function of graph tensors. Its point is one long vector: the values of its leaves, then the
 * tangents of those that carry one, then the weights of a network if it has any. Three things are compared
 * with central differences of its values: the gradient of the result, the tangent of the result, and the
 * gradient of that tangent - by values, by tangents and by weights, which is the second derivative that
 * learning with dy/dlambda needs.
 *
 * Differences are taken at four step sizes, each half of the one before, and extrapolated to step zero
 * (Romberg); in double that leaves about 1e-12 of the size of the result. None of it looks at the derivative
 * to be proven. */

#ifndef DERIVATIVES_H
#define DERIVATIVES_H

#include "diffenc.h"

enum { IN_DOUBLE = sizeof(real) == sizeof(double) };

double larger(double a, double b);   /* what is not a number is the largest of all */

/* An input of a subject: its shape, 1 if it carries a tangent, the range from which it is drawn evenly (both
 * 0: from -1.5 to 1.5), and the length over which the result changes much (0: 1), to which steps are
 * proportional. */
enum { LEAF_HEIGHT, LEAF_WIDTH, LEAF_CHANNELS, LEAF_TANGENT, LEAF_LOW, LEAF_HIGH, LEAF_SCALE, LEAF_NUMBERS };
typedef double Leaf[LEAF_NUMBERS];

enum { MAX_LEAVES = 4 };
typedef struct Subject Subject;
struct Subject {
    Tensor *(*build)(const Subject *subject, Graph *graph, Tensor **leaf);
    const void *context;       /* for `build` */
    Leaf leaf[MAX_LEAVES];     /* ends with the first of height 0 */
    double dropout;            /* rate; the mask is the same in every evaluation */
    Network *network;          /* NULL, or a network whose model->params are part of the point */
    double weight_scale;       /* the scale of its weights */
};

/* The largest errors found; -1 where there is nothing to compare (no leaf has a tangent), INFINITY where
 * kinks are too near to measure anything or the result lacks its tangent. Each element is compared relative
 * to itself, to the root mean square of its leaf or parameter, or to derivative_floor() times the size of the
 * result, whichever is largest. */
typedef struct { double gradient, tangent, through_tangent; } DerivativeErrors;

/* Up to `samples` elements of every leaf and parameter, every one in a random direction, and all of them at
 * once in a random direction. */
DerivativeErrors derivative_errors(const Subject *subject, int samples, uint64_t seed);

/* What rounding leaves of a comparison in this build's precision: the limit for the errors above, and the
 * floor. */
double derivative_limit(void);
double derivative_floor(void);

/* d path(e)/de at e = 0 for a path of `count` numbers that changes over a length of about `scale`; and an
 * upper bound for its error. */
typedef void (*Path)(void *context, double e, double *value);
void differentiate(Path path, void *context, size_t count, double scale, double *derivative, double *error);

/* A new graph with these weights, without dropout and transposed kernels. backward() adds to `gradient`,
 * unless that is NULL. */
Graph *network_restart(Network *network, const real *weights, real *gradient);

/* Every operator and layer of autograd.h, 0 <= index < operator_count(): in many shapes, odd ones among them,
 * and in all combinations of inputs with and without tangents. */
int operator_count(void);
const char *operator_title(int index);
Subject operator_subject(int index);

#endif
