// Task-conditioned routing (TIGER eqs. 4-7) of all tasks from one read of the experts.
//
// Maths: with base = q W0, z = q U, u_k = V^T F_k, c_t = b0 + shift_t (base, z and c_t hold 1 / sqrt(D)):
//     s_tk = base . F_k + sum_r z_r g_tr u_kr + c_t . F_k,   alpha_t = softmax_k s_t,   f_t = sum_k alpha_tk F_k.
// Backward, with ds_tk = alpha_tk (dalpha_tk - sum_j alpha_tj dalpha_tj), dalpha_tk = df_t . F_k + grad_alpha_tk:
//     a_k = sum_t ds_tk, S_k = sum_t ds_tk (z o g_t), dbase = sum_k a_k F_k, dz = sum_t g_t o (sum_k ds_tk u_k),
//     dF_k = sum_t alpha_tk df_t + a_k base + V S_k + sum_t ds_tk c_t, dg_t = sum_n z o (sum_k ds_tk u_k),
//     dV = sum_n sum_k F_k S_k^T, dc_t = sum_n sum_k ds_tk F_k.
// Bytes: forward reads 1 + M and writes T units of B N D elements beside q W0 itself; backward reads 1 + M + T and writes
//     M + 1.
// Layout: a tile of tokens at a time. The tile's M rows a token are multiplied by V in registers while they come from
//     memory; the inner products, the softmax and the mixture then find them in the second cache.
#include "route.h"

#include "entry.h"
#include "product.h"
#include "rows.h"

namespace tiger_fast {
namespace TIGER_FAST_ISA {

namespace {

constexpr int kTile = 8;  // tokens of a tile, at most
// What a tile's rows may take of the second cache.
constexpr int64_t kTileBytes = 192 << 10;

// The rows of up to kTile tokens as accumulators that may be read to the padded width: in place where they are stored so.
template <typename S>
struct Tile {
  using A = acc_t<S>;
  const Route& a;
  int64_t wide;  // padded width
  bool in_place;
  int size;
  A* copies;        // rows of F, token by token
  A* base_copies;
  const A* features[kTile * kMaxExperts + kTileRows];
  const A* base[kTile];
  A z[kTile][kMaxRank];

  Tile(const Route& args, Pieces& pieces) : a(args), wide(in_whole_vectors(args.width)) {
    in_place = sizeof(S) != 2 && a.width == wide;  // products read whole rows of a padded width
    int64_t bytes = a.members * wide * int64_t(sizeof(A));
    size = int(smaller<int64_t>(kTile, larger<int64_t>(1, kTileBytes / bytes)));
    copies = in_place ? nullptr : pieces.take<A>(a.members * size * wide);
    base_copies = in_place ? nullptr : pieces.take<A>(size * wide);
  }

  // A row of D, or its copy in row i of `copies`.
  TF_INLINE const A* dense(const S* p, A* rows, int64_t i) const {
    return widened(p, a.width, !in_place, in_place ? nullptr : rows + i * wide);
  }

  TF_INLINE void read(int64_t first, int count) {
    int members = int(a.members);
    for (int i = 0; i < count; ++i) {
      int64_t b = (first + i) / a.tokens, n = (first + i) % a.tokens;
      for (int k = 0; k < members; ++k)
        features[i * members + k] = dense(row<S>(a.experts[k], b, n), copies, i * members + k);
      base[i] = dense((const S*)a.base + (first + i) * a.width, base_copies, i);
      widened((const S*)a.z + (first + i) * a.rank, a.rank, true, z[i]);
    }
    // Rows that fill up the last register tile of a product; what comes of them is not stored.
    for (int r = count * members; r % kTileRows; ++r) features[r] = features[0];
  }

  // u_k = V^T F_k for every row of the tile.
  TF_INLINE void project(int count, A* u) const {
    int64_t columns = in_whole_vectors(a.rank);
    const A* v = (const A*)a.v;
    product<A>(
        count * int(a.members), columns, a.width, false,
        [&](int i, int64_t d) TF_LAMBDA { return features[i][d]; }, [&](int64_t d) TF_LAMBDA { return v + d * columns; },
        [&](int i) TF_LAMBDA { return u + i * columns; });
  }
};

// What the forward works in.
template <typename S>
struct Forward {
  using A = acc_t<S>;
  Tile<S> tile;
  A* u;            // V^T F, a row for each token and expert
  A* conditioned;  // z o g_t
  A* logits;       // of the tile
  A* products;     // base . F_k, then c_t . F_k

  Forward(const Route& a, Pieces& pieces) : tile(a, pieces) {
    int64_t columns = in_whole_vectors(a.rank);
    u = pieces.take<A>(tile.size * a.members * columns);
    conditioned = pieces.take<A>(a.tasks * columns);
    logits = pieces.take<A>(tile.size * a.tasks * a.members);
    products = pieces.take<A>((a.tasks + 1) * a.members);
  }
};

template <typename S>
void forward(const Route& a, int64_t begin, int64_t end, void* scratch) {
  using A = acc_t<S>;
  int members = int(a.members), tasks = int(a.tasks);
  int64_t columns = in_whole_vectors(a.rank), logits_row = tasks * members;
  Pieces pieces{scratch};
  Forward<S> own(a, pieces);
  Tile<S>& tile = own.tile;
  A *u = own.u, *conditioned = own.conditioned, *logits = own.logits, *products = own.products;
  for (int64_t first = begin; first < end; first += tile.size) {
    int count = int(smaller<int64_t>(tile.size, end - first));
    tile.read(first, count);
    tile.project(count, u);
    for (int i = 0; i < count; ++i) {
      int64_t b = (first + i) / a.tokens;
      const A* scale = (const A*)a.scale + b * a.scale_batch;
      const A* conditions = (const A*)a.conditions + b * a.conditions_batch;
      for (int t = 0; t < tasks; ++t)
        for (int64_t r = 0; r < columns; r += L<A>)
          store(conditioned + t * columns + r, load(tile.z[i] + r) * load(scale + t * columns + r));
      dots<A, A>(
          tasks + 1, members, a.width,
          [&](int t) TF_LAMBDA { return t == 0 ? tile.base[i] : conditions + (t - 1) * a.width; },
          [&](int k) TF_LAMBDA { return tile.features[i * members + k]; }, products, members);
      A* out = logits + i * logits_row;
      dots<A, A>(
          tasks, members, columns, [&](int t) TF_LAMBDA { return conditioned + t * columns; },
          [&](int k) TF_LAMBDA { return u + (i * members + k) * columns; }, out, members);
      for (int t = 0; t < tasks; ++t) {
        A best = -INFINITY;
        for (int k = 0; k < members; ++k) {
          A s = out[t * members + k] + products[k] + products[(t + 1) * members + k];
          out[t * members + k] = s;
          best = s > best || s != s ? s : best;
        }
        for (int k = 0; k < members; ++k) out[t * members + k] -= best;
      }
    }
    for (int64_t j = 0; j < count * logits_row; j += L<A>) store(logits + j, exp(load(logits + j)));
    for (int i = 0; i < count; ++i) {
      int64_t b = (first + i) / a.tokens, n = (first + i) % a.tokens;
      for (int t = 0; t < tasks; ++t) {
        A* shares = logits + i * logits_row + t * members;
        A total = 0;
        for (int k = 0; k < members; ++k) total += shares[k];
        int64_t at = (b * tasks + t) * a.tokens + n;
        for (int k = 0; k < members; ++k) ((A*)a.weights)[at * members + k] = shares[k] /= total;
        mix(tile.features + i * members, shares, members, a.width, (S*)a.out + at * a.width, a.past_caches);
      }
    }
  }
  fence();
}

// What the backward works in.
template <typename S>
struct Backward {
  using A = acc_t<S>;
  Tile<S> tile;
  int64_t task_columns;  // whole register tiles
  A* u;
  A* expanded;   // S_k; a product reads whole register tiles of rows
  A* slopes;     // ds_tk, a row for each token and expert
  A* shares;     // alpha_tk, the same
  A* through_v;  // V S_k
  A* mixed;      // sum_k ds_tk u_k
  A* copies;     // of the outputs' gradients
  A* products;   // dalpha_tk of a token

  Backward(const Route& a, Pieces& pieces) : tile(a, pieces) {
    int64_t columns = in_whole_vectors(a.rank), rows = tile.size * a.members;
    task_columns = (a.tasks + kTileRows - 1) / kTileRows * kTileRows;
    u = pieces.take<A>(rows * columns);
    expanded = pieces.take<A>((rows + kTileRows) * columns);
    slopes = pieces.take<A>(rows * task_columns);
    shares = pieces.take<A>(rows * task_columns);
    through_v = pieces.take<A>(rows * tile.wide);
    mixed = pieces.take<A>(a.tasks * columns);
    copies = tile.in_place ? nullptr : pieces.take<A>(a.tasks * tile.size * tile.wide);
    products = pieces.take<A>(a.tasks * a.members);
  }
};

// One chunk of tokens.
template <typename S>
void backward(const RouteBackward& args, int64_t chunk, Backward<S>& own) {
  using A = acc_t<S>;
  const Route& a = args.inputs;
  Tile<S>& tile = own.tile;
  int members = int(a.members), tasks = int(a.tasks);
  int64_t columns = in_whole_vectors(a.rank), wide = tile.wide, task_columns = own.task_columns;
  bool into_experts = false;
  for (int k = 0; k < members; ++k) into_experts |= args.grad_experts[k] != nullptr;
  bool needs_u = args.grad_z || args.grad_scale;
  A *u = own.u, *expanded = own.expanded, *slopes = own.slopes, *shares = own.shares, *through_v = own.through_v;
  A *mixed = own.mixed, *products = own.products;
  const A* grads[kTile][kMaxTasks];

  int64_t begin = chunk * args.chunk, end = smaller(begin + args.chunk, a.batch * a.tokens);
  A* sum_v = cleared<A>(args.grad_v, chunk, a.rank * wide);
  int64_t scale_slot = -1, conditions_slot = -1;
  auto slot = [&](void* sums, int64_t per_sample, int64_t b, int64_t size, int64_t& current) TF_LAMBDA {
    int64_t now = per_sample ? b + chunk : chunk;
    A* p = (A*)sums + now * size;
    if (now != current) clear(p, size);
    current = now;
    return p;
  };

  for (int64_t first = begin; first < end;) {
    // A tile ends with its sample, so that sums per sample end with a tile.
    int64_t b = first / a.tokens, n0 = first % a.tokens;
    int count = int(smaller(smaller<int64_t>(tile.size, end - first), a.tokens - n0));
    tile.read(first, count);
    const A* scale = (const A*)a.scale + b * a.scale_batch;
    const A* conditions = (const A*)a.conditions + b * a.conditions_batch;
    for (int i = 0; i < count; ++i)
      for (int t = 0; t < tasks; ++t)
        grads[i][t] = args.grad_tokens.data
                          ? tile.dense(row<S>(args.grad_tokens, b, t, n0 + i), own.copies, i * tasks + t)
                          : nullptr;
    if (needs_u) tile.project(count, u);
    A* sum_scale = args.grad_scale ? slot(args.grad_scale, a.scale_batch, b, tasks * columns, scale_slot) : nullptr;

    for (int i = 0; i < count; ++i) {
      clear(products, tasks * members);
      if (args.grad_tokens.data)
        dots<A, A>(
            tasks, members, a.width, [&](int t) TF_LAMBDA { return grads[i][t]; },
            [&](int k) TF_LAMBDA { return tile.features[i * members + k]; }, products, members);
      for (int t = 0; t < tasks; ++t) {
        const A* alpha = (const A*)a.weights + ((b * tasks + t) * a.tokens + n0 + i) * members;
        A level = 0;
        for (int k = 0; k < members; ++k) {
          if (args.grad_weights.data)
            products[t * members + k] +=
                at<A>(args.grad_weights, b * args.grad_weights.stride[0] + t * args.grad_weights.stride[1] +
                                             (n0 + i) * args.grad_weights.stride[2] + k * args.grad_weights.stride[3]);
          level += alpha[k] * products[t * members + k];
        }
        for (int k = 0; k < members; ++k) {
          shares[(i * members + k) * task_columns + t] = alpha[k];
          slopes[(i * members + k) * task_columns + t] = alpha[k] * (products[t * members + k] - level);
        }
      }
      for (int k = 0; k < members; ++k) {
        A* slope = slopes + (i * members + k) * task_columns;
        for (int64_t t = tasks; t < task_columns; ++t) slope[t] = 0;
        for (int64_t r = 0; r < columns; r += L<A>) {
          Vec<A> total = {};
          for (int t = 0; t < tasks; ++t) total += slope[t] * load(scale + t * columns + r);
          store(expanded + (i * members + k) * columns + r, total * load(tile.z[i] + r));
        }
      }
      if (needs_u) {
        for (int t = 0; t < tasks; ++t)
          for (int64_t r = 0; r < columns; r += L<A>) {
            Vec<A> total = {};
            for (int k = 0; k < members; ++k)
              total += slopes[(i * members + k) * task_columns + t] * load(u + (i * members + k) * columns + r);
            store(mixed + t * columns + r, total);
          }
        if (args.grad_z)
          along<A>(a.rank, [&](int64_t r, auto partial, int n) TF_LAMBDA {
            Vec<A> total = {};
            for (int t = 0; t < tasks; ++t) total += load(scale + t * columns + r) * load(mixed + t * columns + r);
            put((S*)args.grad_z + (first + i) * a.rank, r, total, partial, n);
          });
        if (sum_scale)
          for (int64_t j = 0; j < tasks * columns; j += L<A>)
            store(sum_scale + j, load(sum_scale + j) + load(tile.z[i] + j % columns) * load(mixed + j));
      }
      if (args.grad_base) {
        A sums[kMaxExperts];
        for (int k = 0; k < members; ++k) {
          sums[k] = 0;
          for (int t = 0; t < tasks; ++t) sums[k] += slopes[(i * members + k) * task_columns + t];
        }
        mix(tile.features + i * members, sums, members, a.width, (S*)args.grad_base + (first + i) * a.width, false);
      }
    }

    int rows = count * members;
    if (sum_v)
      product<A>(
          int(a.rank), wide, rows, true, [&](int r, int64_t k) TF_LAMBDA { return expanded[k * columns + r]; },
          [&](int64_t k) TF_LAMBDA { return tile.features[k]; }, [&](int r) TF_LAMBDA { return sum_v + r * wide; });
    if (args.grad_conditions) {
      A* sum_c = slot(args.grad_conditions, a.conditions_batch, b, tasks * wide, conditions_slot);
      product<A>(
          tasks, wide, rows, true, [&](int t, int64_t k) TF_LAMBDA { return slopes[k * task_columns + t]; },
          [&](int64_t k) TF_LAMBDA { return tile.features[k]; }, [&](int t) TF_LAMBDA { return sum_c + t * wide; });
    }
    if (into_experts) {
      const A* v = (const A*)args.v_transposed;
      product<A>(
          rows, wide, a.rank, false, [&](int i, int64_t r) TF_LAMBDA { return expanded[i * columns + r]; },
          [&](int64_t r) TF_LAMBDA { return v + r * wide; }, [&](int i) TF_LAMBDA { return through_v + i * wide; });
      for (int i = 0; i < count; ++i)
        for (int k = 0; k < members; ++k) {
          if (!args.grad_experts[k]) continue;
          int at = i * members + k, terms = 0;
          const A* sources[2 * kMaxTasks + 2];
          A factors[2 * kMaxTasks + 2];
          auto term = [&](const A* source, A factor) TF_LAMBDA { sources[terms] = source, factors[terms++] = factor; };
          term(through_v + at * wide, 1);
          A total = 0;
          for (int t = 0; t < tasks; ++t) {
            A slope = slopes[at * task_columns + t];
            total += slope;
            term(conditions + t * a.width, slope);
            if (args.grad_tokens.data) term(grads[i][t], shares[at * task_columns + t]);
          }
          term(tile.base[i], total);
          mix(sources, factors, terms, a.width, (S*)args.grad_experts[k] + (first + i) * a.width, a.past_caches);
        }
    }
    first += count;
  }
  fence();
}

template <typename A>
void condition(const Conditions& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    int64_t from = i / a.tasks * a.batch + i % a.tasks * a.task;
    for (int64_t d = 0; d < a.width; ++d) {
      A c = at<A>(a.shift, from + d * a.column);
      if (a.bias.data) c += at<A>(a.bias, d * a.bias.stride[0]);
      ((A*)a.out)[i * a.width + d] = c * A(a.root);
    }
  }
}

}  // namespace

void conditions(const Conditions& a, int64_t begin, int64_t end) {
  if (a.wide)
    condition<double>(a, begin, end);
  else
    condition<float>(a, begin, end);
}

int64_t route_scratch(const Route& a) {
  Pieces pieces{};
  by_type(a.type, [&](auto s) { Forward<decltype(s)>(a, pieces); });
  return pieces.bytes;
}

int64_t route_backward_scratch(const RouteBackward& a) {
  Pieces pieces{};
  by_type(a.inputs.type, [&](auto s) { Backward<decltype(s)>(a.inputs, pieces); });
  return pieces.bytes;
}

void route(const Route& a, int64_t begin, int64_t end, void* scratch) {
  by_type(a.type, [&](auto s) { forward<decltype(s)>(a, begin, end, scratch); });
}

void route_backward(const RouteBackward& a, int64_t begin, int64_t end, void* scratch) {
  by_type(a.inputs.type, [&](auto s) {
    Pieces pieces{scratch};
    Backward<decltype(s)> own(a.inputs, pieces);
    for (int64_t chunk = begin; chunk < end; ++chunk) backward(a, chunk, own);
  });
}

}  // namespace TIGER_FAST_ISA
}  // namespace tiger_fast
