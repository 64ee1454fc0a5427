/* Every operation's source, compiled for one instruction set. A new operation adds a line here and one in api.h. */
#include "simd.h"
#include "api.h"

#include "micro.h"

#include "embed.h"
#include "norm.h"
#include "linear.h"
#include "qkv.h"
#include "prefill.h"
#include "mass.h"
#include "encoder.h"
#include "sample.h"

#include "lanes.h"
#include "streams.h"
#include "rotated.h"
#include "baselines.h"
#include "pack.h"
#include "kv.h"
#include "coded.h"
#include "decoded.h"
#include "decode.h"
