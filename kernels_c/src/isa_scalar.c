/* The portable path: four-lane vectors that any compiler can lower. */
#include "common.h"

#define FN(name) name##_scalar
#include "kernels.h"
