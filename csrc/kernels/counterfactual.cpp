// Counterfactual losses of a linear head (TIGER eq. 8), in full and without each expert, from one read of the experts.
//
// Maths:   P_k = F_k W^T, y = sum over k of w_k P_k + b, y_k the same without k; losses of y and y_k, per token.
//          Backward, with logit gradients G_0 (of y) and G_k, and H_k = G_0 + sum over j != k of G_j:
//          dP_k = w_k H_k, dw_k = P_k . H_k, dF_k = dP_k W, dW = sum of dP_k^T F_k, db = sum of G_0 + sum of G_k.
//          What is left out is never subtracted: an inf or a NaN of expert k must not reach what leaves k out.
// Bytes:   forward reads M units of B N D elements; backward reads M and writes M. P is made again there, or
//          kept from forward in B N M C accumulators where that is no more than one tensor of features.
// Layout:  a tile of tokens at a time: their M rows each are multiplied with the packed head, and the logits are made
//          and consumed in the first cache. Tokens that do not count are not read at all.
#include "counterfactual.h"

#include "entry.h"
#include "product.h"
#include "rows.h"

namespace tiger_fast {
namespace TIGER_FAST_ISA {
namespace {

constexpr int kMostRows = 16 * kMaxExperts;   // of one tile, see tile_of
constexpr int64_t kDepth = 1024;              // of one pass of a product, so that its panel stays in the second cache
constexpr int64_t kHeadInCache = 256 * 1024;  // bytes, of a second cache of 512 KiB or more

// ---- the head

// The head's transpose in columns of classes; units are values of d.
template <typename A>
void panel(const CounterfactualPack& a, int64_t begin, int64_t end) {
  for (int64_t c = 0; c < padded<A>(a.classes); ++c) {
    A* out = (A*)a.panel + c / kColumn * kColumn * a.width + c % kColumn;
    const A* row = (const A*)a.head + c * a.head_stride;
    for (int64_t d = begin; d < end; ++d) out[d * kColumn] = c < a.classes ? row[d] : A(0);
  }
}

// The head in columns of D, and back; units are classes.
template <typename A, bool BACK>
void columns(const CounterfactualPack& a, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c)
    for (int64_t start = 0; start < a.width; start += kColumn) {
      A* row = (A*)a.head + c * a.head_stride + start;
      A* packed = (A*)a.columns + start * a.classes + c * kColumn;
      int64_t count = smaller(kColumn, a.width - start);
      if (BACK)
        for (int64_t d = 0; d < count; ++d) row[d] = packed[d];
      else
        for (int64_t d = 0; d < kColumn; ++d) packed[d] = d < count ? row[d] : A(0);
    }
}

// out[i][c] = rows[i] . head[c], zeros behind the last class. rows has entries up to whole register tiles.
template <typename A>
__attribute__((noinline)) void project(const A* const* rows, int count, const Counterfactual& a, A* out,
                                       int64_t stride) {
  if (!a.panel) {
    dots<A, A>(
        count, int(a.classes), a.width, [&](int i) TF_LAMBDA { return rows[i]; },
        [&](int c) TF_LAMBDA { return (const A*)a.head + c * a.head_stride; }, out, stride);
    for (int i = 0; i < count; ++i)
      for (int64_t c = a.classes; c < padded<A>(a.classes); ++c) out[i * stride + c] = 0;
    return;
  }
  for (int64_t start = 0; start < a.width; start += kDepth) {
    int64_t depth = smaller(kDepth, a.width - start);
    int64_t columns = kHalves ? (a.classes + L<A> / 2 - 1) / (L<A> / 2) * (L<A> / 2) : padded<A>(a.classes);
    by_tiles<A, kHalves>(columns, [&](int64_t c, auto width) TF_LAMBDA {
      const A* panel = (const A*)a.panel + c / kColumn * kColumn * a.width + start * kColumn + c % kColumn;
      for (int i = 0; i < count; i += kTileRows) {
        if (c == 0 && i + kTileRows < count)  // the rows that come next
          for (int r = i + kTileRows; r < i + 2 * kTileRows; ++r)
            for (int64_t d = 0; d < depth; d += 64 / int64_t(sizeof(A))) __builtin_prefetch(rows[r] + start + d, 0, 2);
        const A* left[kTileRows];
        for (int r = 0; r < kTileRows; ++r) left[r] = rows[i + r] + start;
        product_tile<A, kTileRows>(
            width, depth, count - i, start > 0, [&](int r, int64_t k) TF_LAMBDA { return left[r][k]; },
            [&](int64_t k) TF_LAMBDA { return panel + k * kColumn; },
            [&](int r) TF_LAMBDA { return out + (i + r) * stride + c; });
      }
    });
  }
}

// Few classes would leave most lanes of a vector over classes empty: vectors then go over tokens. cross_entropy is
// faster so with more classes too, as long as what it keeps of each token fits the first cache so many times.
TF_INLINE bool few_classes(const Counterfactual& a) {
  return a.classes <= 16 || (a.loss == TokenLoss::cross_entropy && (2 * a.members + 4) * a.classes <= 640);
}

// Tokens that are projected together: enough rows of features for whole register tiles, few enough to stay in a cache.
// Projections of a few classes are small: there, whole vectors of tokens.
TF_INLINE int64_t tile_of(const Counterfactual& a) {
  bool small = a.projected && few_classes(a);
  return a.members >= 4 && !small ? 8 : a.members >= 2 ? 16 : 32;
}

// ---- the losses of one token

template <typename A>
struct Token {
  int64_t index, b, n;
  int64_t label;
  A weights[kMaxExperts];
};

// Where classes are few: a vector holds one number each of L tokens.
template <typename A>
struct Across {
  A* projections;  // (M, C)
  A* logits;       // (M + 1, C)
  A* weights;      // (M)
  A* target;       // (C)
  A* grad_target;  // (C)
  A* bias_sums;    // (C)
  A* grads;        // (M + 1), of the losses
  A* results;      // (M + 1), the losses; in backward (M), dw
  A* label;        // -1: no class
};

// What one range of tokens works in.
template <typename A>
struct Working {
  int64_t stride;   // of rows over classes
  int64_t columns;  // the classes in whole vectors
  A* projections;   // of the tile's tokens and experts, by token
  A* logits;        // of one token: in full, then without each expert
  A* target;        // of one token; zeros behind the last class
  A* grad_target;
  A* bias;          // zeros behind the last class
  A* bias_sums;
  A* features;      // of the tile, as accumulators; then their gradients
  Across<A> across;

  Working(const Counterfactual& a, Pieces& pieces) : stride(in_whole_vectors(a.classes)), columns(padded<A>(a.classes)) {
    int64_t rows = tile_of(a) * a.members;
    projections = pieces.take<A>(rows * stride);
    logits = pieces.take<A>((a.members + 1) * stride);
    target = pieces.take<A>(stride);
    grad_target = pieces.take<A>(stride);
    bias = pieces.take<A>(stride);
    bias_sums = pieces.take<A>(stride);
    features = a.projected ? nullptr : pieces.take<A>(rows * in_whole_vectors(a.width));
    across = {};
    if (!few_classes(a)) return;
    auto vectors = [&](int64_t count) TF_LAMBDA { return pieces.take<A>(count * L<A>); };
    across.projections = vectors(a.members * a.classes);
    across.logits = vectors((a.members + 1) * a.classes);
    across.weights = vectors(a.members);
    across.target = vectors(a.classes);
    across.grad_target = vectors(a.classes);
    across.bias_sums = vectors(a.classes);
    across.grads = vectors(a.members + 1);
    across.results = vectors(a.members + 1);
    across.label = vectors(1);
  }

  TF_INLINE void read_bias(const Counterfactual& a) const {
    for (int64_t c = 0; c < stride; ++c) {
      bias[c] = a.bias && c < a.classes ? ((const A*)a.bias)[c] : A(0);
      target[c] = 0;
    }
  }
};

// Row sums of the classes' vectors.
template <typename A, typename Step>
TF_INLINE A total(int64_t columns, Step step) {
  Vec<A> sums = {};
  for (int64_t c = 0; c < columns; c += L<A>) sums += step(c);
  return sum(sums);
}

template <typename A>
TF_INLINE Vec<A> magnitude(Vec<A> x) {
  return x < 0 ? -x : x;
}

// log(1 + e), exact where e is tiny.
template <typename A>
TF_INLINE Vec<A> log1p(Vec<A> e) {
  Vec<A> u = 1 + e;
  return log(u) + (e - (u - 1)) / u;
}

// The numbers of the lanes.
template <typename A>
TF_INLINE Vec<A> iota() {
  Vec<A> x;
  for (int i = 0; i < L<A>; ++i) x[i] = A(i);
  return x;
}

// What stands behind the last class so that it adds nothing to a loss.
template <typename A>
TF_INLINE A filler(TokenLoss loss) {
  return loss == TokenLoss::cross_entropy ? A(-INFINITY) : loss == TokenLoss::bce ? A(-1e30) : A(0);
}

// The logits of a token in full and without each expert: sums from both ends meet at the expert that is left out.
template <typename A>
TF_INLINE void make_logits(const Counterfactual& a, const Working<A>& s, const Token<A>& token, const A* projections) {
  int members = int(a.members);
  for (int64_t c = 0; c < s.columns; c += L<A>) {
    Vec<A> behind = {};
    for (int k = members - 1; k >= 0; --k) {
      store(s.logits + (k + 1) * s.stride + c, behind);
      behind += token.weights[k] * load(projections + k * s.stride + c);
    }
    Vec<A> before = load(s.bias + c);
    for (int k = 0; k < members; ++k) {
      A* without = s.logits + (k + 1) * s.stride + c;
      store(without, load(without) + before);
      before += token.weights[k] * load(projections + k * s.stride + c);
    }
    store(s.logits + c, before);
  }
  if (int64_t c = s.columns - L<A>, rest = a.classes - c; rest < L<A>) {
    auto there = iota<A>() < A(rest);
    for (int i = 0; i <= members; ++i) {
      A* y = s.logits + i * s.stride + c;
      store(y, there ? load(y) : splat(filler<A>(a.loss)));
    }
  }
}

// The largest logit, as what exponents are taken relative to; a NaN may be passed over, it stays in the exponentials.
template <typename A>
TF_INLINE A peak(const A* y, int64_t columns) {
  Vec<A> most = load(y);
  for (int64_t c = L<A>; c < columns; c += L<A>) {
    Vec<A> x = load(y + c);
    most = most > x ? most : x;
  }
  for (int step = L<A> / 2; step > 0; step /= 2) {
    Vec<A> turned = {};
    for (int i = 0; i < L<A>; ++i) turned[i] = most[(i + step) % L<A>];
    most = most > turned ? most : turned;
  }
  A best = most[0];
  return best - best == 0 ? best : A(0);  // an infinite one gives inf or NaN by itself
}

// |y|^2, |t|^2 and y . t, and what their quotient is divided by.
template <typename A>
struct Angle {
  A yy, tt, yt, norms;

  TF_INLINE Angle(const A* y, const A* t, int64_t columns) {
    yy = total<A>(columns, [&](int64_t c) TF_LAMBDA { return load(y + c) * load(y + c); });
    tt = total<A>(columns, [&](int64_t c) TF_LAMBDA { return load(t + c) * load(t + c); });
    yt = total<A>(columns, [&](int64_t c) TF_LAMBDA { return load(y + c) * load(t + c); });
    norms = A(__builtin_sqrt(double(yy))) * A(__builtin_sqrt(double(tt)));
  }
  TF_INLINE bool clamped() const { return norms < A(1e-8); }
  TF_INLINE A divisor() const { return clamped() ? A(1e-8) : norms; }
};

// losses[i] of the M + 1 rows of logits.
template <typename A>
__attribute__((noinline)) void token_losses(const Counterfactual& a, const Working<A>& s, const Token<A>& token,
                                            A* losses) {
  int rows = int(a.members) + 1;
  const A* t = s.target;
  A each = 1 / A(a.classes);
  switch (a.loss) {
    case TokenLoss::cross_entropy: {
      alignas(kBytes) A sums[kMaxExperts + L<A>] = {};
      bool exists = token.label >= 0 && token.label < a.classes;
      for (int i = 0; i < rows; ++i) {
        const A* y = s.logits + i * s.stride;
        A top = peak(y, s.columns);
        sums[i] = total<A>(s.columns, [&](int64_t c) TF_LAMBDA { return exp(load(y + c) - top); });
        losses[i] = exists ? top - y[token.label] : A(NAN);
      }
      for (int i = 0; i < rows; i += L<A>) store(sums + i, log(load(sums + i)));
      for (int i = 0; i < rows; ++i) losses[i] += sums[i];
      return;
    }
    case TokenLoss::l1:
      for (int i = 0; i < rows; ++i) {
        const A* y = s.logits + i * s.stride;
        losses[i] = each * total<A>(s.columns, [&](int64_t c) TF_LAMBDA {
          return magnitude<A>(load(y + c) - load(t + c));
        });
      }
      return;
    case TokenLoss::mse:
      for (int i = 0; i < rows; ++i) {
        const A* y = s.logits + i * s.stride;
        losses[i] = each * total<A>(s.columns, [&](int64_t c) TF_LAMBDA {
          Vec<A> difference = load(y + c) - load(t + c);
          return difference * difference;
        });
      }
      return;
    case TokenLoss::bce:
      for (int i = 0; i < rows; ++i) {
        const A* y = s.logits + i * s.stride;
        losses[i] = each * total<A>(s.columns, [&](int64_t c) TF_LAMBDA {
          Vec<A> x = load(y + c);
          return (x < 0 ? Vec<A>{} : x) - x * load(t + c) + log1p<A>(exp(-magnitude<A>(x)));
        });
      }
      return;
    case TokenLoss::cosine:
      for (int i = 0; i < rows; ++i) {
        Angle<A> angle(s.logits + i * s.stride, t, s.columns);
        losses[i] = 1 - angle.yt / angle.divisor();
      }
      return;
  }
}

// Each row of logits becomes its own gradient, times grads[i]; adds the target's to s.grad_target if `to_target`.
template <typename A>
__attribute__((noinline)) void token_gradients(const Counterfactual& a, const Working<A>& s, const Token<A>& token,
                                               const A* grads, const bool* absent, bool to_target) {
  const A* t = s.target;
  for (int i = 0; i <= a.members; ++i) {
    A* y = s.logits + i * s.stride;
    auto each = [&](auto step) TF_LAMBDA {
      for (int64_t c = 0; c < s.columns; c += L<A>) store(y + c, step(c, load(y + c)));
    };
    auto add_to_target = [&](int64_t c, Vec<A> x) TF_LAMBDA { store(s.grad_target + c, load(s.grad_target + c) + x); };
    if (absent[i]) {
      each([&](int64_t, Vec<A>) TF_LAMBDA { return Vec<A>{}; });
      continue;
    }
    A g = grads[i], share = g / A(a.classes);
    switch (a.loss) {
      case TokenLoss::cross_entropy: {
        if (token.label < 0 || token.label >= a.classes) {
          each([&](int64_t, Vec<A>) TF_LAMBDA { return splat(A(NAN)); });
          break;
        }
        A top = peak(y, s.columns);
        A norm = total<A>(s.columns, [&](int64_t c) TF_LAMBDA {
          Vec<A> e = exp(load(y + c) - top);
          store(y + c, e);
          return e;
        });
        A scale = g / norm;
        each([&](int64_t, Vec<A> e) TF_LAMBDA { return scale * e; });
        y[token.label] -= g;
        break;
      }
      case TokenLoss::l1:
        each([&](int64_t c, Vec<A> x) TF_LAMBDA {
          Vec<A> d = x - load(t + c), zero = {};
          Vec<A> one = (d > 0 ? splat(share) : zero) - (d < 0 ? splat(share) : zero);
          if (to_target) add_to_target(c, -one);
          return one;
        });
        break;
      case TokenLoss::mse:
        each([&](int64_t c, Vec<A> x) TF_LAMBDA {
          Vec<A> d = 2 * share * (x - load(t + c));
          if (to_target) add_to_target(c, -d);
          return d;
        });
        break;
      case TokenLoss::bce:
        each([&](int64_t c, Vec<A> x) TF_LAMBDA {
          Vec<A> e = exp(-magnitude<A>(x));
          if (to_target) add_to_target(c, -share * x);
          return share * ((x < 0 ? e : splat(A(1))) / (1 + e) - load(t + c));
        });
        break;
      case TokenLoss::cosine: {
        Angle<A> angle(y, t, s.columns);
        // The norms' own derivatives, but where the divisor is held, or a norm is 0.
        A level = angle.clamped() ? A(0) : angle.yt / angle.norms;
        A along_y = level == 0 ? A(0) : g * level / angle.yy, along_t = level == 0 ? A(0) : g * level / angle.tt;
        A scale = -g / angle.divisor();
        each([&](int64_t c, Vec<A> x) TF_LAMBDA {
          if (to_target) add_to_target(c, scale * x + along_t * load(t + c));
          return scale * load(t + c) + along_y * x;
        });
        break;
      }
    }
  }
}

// ---- tokens in and out

// Whether the token counts; if so, its class and its weights.
template <typename A>
TF_INLINE bool read_token(const Counterfactual& a, int64_t index, int64_t b, int64_t n, Token<A>& token) {
  if (a.valid && !a.valid[b * a.valid_stride[0] + n * a.valid_stride[1]]) return false;
  token.index = index, token.b = b, token.n = n;
  if (a.loss == TokenLoss::cross_entropy) {
    int64_t offset = b * a.label_stride[0] + n * a.label_stride[1];
    token.label = a.wide_labels ? ((const int64_t*)a.labels)[offset] : ((const int32_t*)a.labels)[offset];
    if (token.label == a.ignore_index) return false;
  }
  for (int k = 0; k < a.members; ++k)
    token.weights[k] = at<A>(a.weights, b * a.weights.stride[0] + n * a.weights.stride[1] + k * a.weights.stride[2]);
  return true;
}

// The target's classes, `apart` elements apart in `out`.
template <typename A>
TF_INLINE void read_target(const Counterfactual& a, const Token<A>& token, A* out, int64_t apart) {
  if (a.loss == TokenLoss::cross_entropy) return;
  int64_t offset = token.b * a.target.stride[0] + token.n * a.target.stride[1], step = a.target.stride[2];
  by_type(a.target.type, [&](auto s) TF_LAMBDA {
    const auto* from = (const decltype(s)*)a.target.data + offset;
    for (int64_t c = 0; c < a.classes; ++c) out[c * apart] = A(value(from[c * step]));
  });
}

// The tokens from `next` on that count, at most a tile of them, with their projections: made from the features, or
// those that forward kept if `recall`; then the features are read only if `features`. skip(index, b, n) is told of
// other tokens.
template <typename S, typename Skip>
TF_INLINE int read_tile(const Counterfactual& a, const Working<acc_t<S>>& s, int64_t& next, int64_t end, bool recall,
                        bool features, bool whole_vectors, Token<acc_t<S>>* tokens, const acc_t<S>** rows, Skip skip) {
  using A = acc_t<S>;
  int members = int(a.members), most = int(tile_of(a)), count = 0;
  int64_t b = next / a.tokens, n = next % a.tokens - 1;
  for (; next < end && count < most; ++next) {
    if (++n == a.tokens) ++b, n = 0;
    Token<A>& token = tokens[count];
    if (!read_token(a, next, b, n, token)) {
      skip(next, b, n);
      continue;
    }
    for (int k = 0; k < members; ++k) {
      int i = count * members + k;
      const S* from = row<S>(a.features[k], token.b, token.n);
      if (recall)
        widened((const A*)a.kept + (next * members + k) * a.classes, a.classes, true, s.projections + i * s.stride);
      if (a.projected)
        widened(from, a.classes, true, s.projections + i * s.stride);
      else if (features)
        rows[i] = widened(from, a.width, whole_vectors && a.width % L<A>, s.features + i * in_whole_vectors(a.width));
    }
    ++count;
  }
  if (count && !a.projected && !recall) {
    int filled = count * members;
    for (int i = 0; i < kTileRows; ++i) rows[filled + i] = rows[filled - 1];
    project(rows, filled, a, s.projections, s.stride);
  }
  return count;
}

// ---- few classes: the losses of up to L tokens, one in each lane

// Turns `there` tokens and their projections; zeros in the other lanes.
template <typename A>
TF_INLINE void read_across(const Counterfactual& a, const Working<A>& s, const Token<A>* tokens, int there,
                           const A* projections) {
  const Across<A>& x = s.across;
  int members = int(a.members), classes = int(a.classes);
  if (there < L<A>) {
    clear(x.projections, members * classes * L<A>);
    clear(x.weights, members * L<A>);
    clear(x.target, classes * L<A>);
    clear(x.label, L<A>);
  }
  for (int i = 0; i < there; ++i) {
    for (int k = 0; k < members; ++k) {
      x.weights[k * L<A> + i] = tokens[i].weights[k];
      const A* from = projections + (i * members + k) * s.stride;
      A* to = x.projections + k * classes * L<A> + i;
      for (int c = 0; c < classes; ++c) to[c * L<A>] = from[c];
    }
    read_target(a, tokens[i], x.target + i, L<A>);
    if (a.loss == TokenLoss::cross_entropy) {
      int64_t label = tokens[i].label;
      x.label[i] = label >= 0 && label < classes ? A(label) : A(-1);
    }
  }
}

// make_logits; 0 in lanes that hold no token, whatever the bias, so that their gradients are 0.
template <typename A>
__attribute__((noinline)) void logits_across(const Counterfactual& a, const Working<A>& s, int there) {
  const Across<A>& x = s.across;
  int members = int(a.members), row = int(a.classes) * L<A>;
  auto held = iota<A>() < A(there);
  for (int c = 0; c < a.classes; ++c) {
    const A* p = x.projections + c * L<A>;
    A* y = x.logits + c * L<A>;
    Vec<A> behind = {};
    for (int k = members - 1; k >= 0; --k) {
      store(y + (k + 1) * row, behind);
      behind += load(x.weights + k * L<A>) * load(p + k * row);
    }
    Vec<A> before = held ? splat(s.bias[c]) : Vec<A>{};
    for (int k = 0; k < members; ++k) {
      store(y + (k + 1) * row, load(y + (k + 1) * row) + before);
      before += load(x.weights + k * L<A>) * load(p + k * row);
    }
    store(y, before);
  }
}

// The sum of step(c) over the classes, where c is where a class begins.
template <typename A, typename Step>
TF_INLINE Vec<A> total_across(int classes, Step step) {
  Vec<A> sums = {};
  for (int c = 0; c < classes; ++c) sums += step(c * L<A>);
  return sums;
}

// `peak` of each lane.
template <typename A>
TF_INLINE Vec<A> peak_across(const A* y, int classes) {
  Vec<A> most = load(y);
  for (int c = 1; c < classes; ++c) {
    Vec<A> z = load(y + c * L<A>);
    most = most > z ? most : z;
  }
  return most - most == 0 ? most : Vec<A>{};
}

// `Angle` of each lane.
template <typename A>
struct AngleAcross {
  Vec<A> yy, tt, yt, norms;

  TF_INLINE AngleAcross(const A* y, const A* t, int classes) {
    yy = total_across<A>(classes, [&](int c) TF_LAMBDA { return load(y + c) * load(y + c); });
    tt = total_across<A>(classes, [&](int c) TF_LAMBDA { return load(t + c) * load(t + c); });
    yt = total_across<A>(classes, [&](int c) TF_LAMBDA { return load(y + c) * load(t + c); });
    norms = root(yy) * root(tt);
  }
  TF_INLINE Vec<A> divisor() const { return norms < A(1e-8) ? splat(A(1e-8)) : norms; }
};

// token_losses, into `results`.
template <typename A>
__attribute__((noinline)) void losses_across(const Counterfactual& a, const Working<A>& s) {
  const Across<A>& x = s.across;
  int classes = int(a.classes), rows = int(a.members) + 1;
  const A* t = x.target;
  A each = 1 / A(classes);
  auto by_row = [&](auto loss) TF_LAMBDA {
    for (int i = 0; i < rows; ++i) store(x.results + i * L<A>, loss(x.logits + i * classes * L<A>));
  };
  auto mean = [&](auto loss) TF_LAMBDA {
    by_row([&](const A* y) TF_LAMBDA {
      return each * total_across<A>(classes, [&](int c) TF_LAMBDA { return loss(load(y + c), load(t + c)); });
    });
  };
  switch (a.loss) {
    case TokenLoss::cross_entropy:
      return by_row([&](const A* y) TF_LAMBDA {
        Vec<A> top = peak_across(y, classes), label = load(x.label), sums = {}, picked = splat(A(NAN));
        for (int c = 0; c < classes; ++c) {
          Vec<A> z = load(y + c * L<A>);
          sums += exp(z - top);
          picked = label == A(c) ? z : picked;
        }
        return top - picked + log(sums);
      });
    case TokenLoss::l1:
      return mean([](Vec<A> y, Vec<A> t) TF_LAMBDA { return magnitude<A>(y - t); });
    case TokenLoss::mse:
      return mean([](Vec<A> y, Vec<A> t) TF_LAMBDA { return (y - t) * (y - t); });
    case TokenLoss::bce:
      return mean([](Vec<A> y, Vec<A> t) TF_LAMBDA {
        return (y < 0 ? Vec<A>{} : y) - y * t + log1p<A>(exp(-magnitude<A>(y)));
      });
    case TokenLoss::cosine:
      return by_row([&](const A* y) TF_LAMBDA {
        AngleAcross<A> angle(y, t, classes);
        return 1 - angle.yt / angle.divisor();
      });
  }
}

// token_gradients: each row of logits becomes its own gradient; adds the target's if `to_target`.
template <typename A>
__attribute__((noinline)) void gradients_across(const Counterfactual& a, const Working<A>& s, const bool* absent,
                                                bool to_target) {
  const Across<A>& x = s.across;
  int classes = int(a.classes);
  const A* t = x.target;
  for (int i = 0; i <= a.members; ++i) {
    A* y = x.logits + i * classes * L<A>;
    auto each = [&](auto step) TF_LAMBDA {
      for (int c = 0; c < classes * L<A>; c += L<A>) store(y + c, step(c, load(y + c)));
    };
    auto add_to_target = [&](int c, Vec<A> d) TF_LAMBDA {
      if (to_target) store(x.grad_target + c, load(x.grad_target + c) + d);
    };
    if (absent[i]) {
      each([&](int, Vec<A>) TF_LAMBDA { return Vec<A>{}; });
      continue;
    }
    Vec<A> g = load(x.grads + i * L<A>), share = g / A(classes), zero = {};
    switch (a.loss) {
      case TokenLoss::cross_entropy: {
        Vec<A> top = peak_across(y, classes), label = load(x.label), norm = {};
        each([&](int, Vec<A> z) TF_LAMBDA {
          Vec<A> e = exp(z - top);
          norm += e;
          return e;
        });
        Vec<A> scale = label < 0 ? splat(A(NAN)) : g / norm;
        each([&](int c, Vec<A> e) TF_LAMBDA { return scale * e - (label == A(c / L<A>) ? g : zero); });
        break;
      }
      case TokenLoss::l1:
        each([&](int c, Vec<A> z) TF_LAMBDA {
          Vec<A> d = z - load(t + c);
          Vec<A> one = (d > 0 ? share : zero) - (d < 0 ? share : zero);
          add_to_target(c, -one);
          return one;
        });
        break;
      case TokenLoss::mse:
        each([&](int c, Vec<A> z) TF_LAMBDA {
          Vec<A> d = 2 * share * (z - load(t + c));
          add_to_target(c, -d);
          return d;
        });
        break;
      case TokenLoss::bce:
        each([&](int c, Vec<A> z) TF_LAMBDA {
          Vec<A> e = exp(-magnitude<A>(z));
          add_to_target(c, -share * z);
          return share * ((z < 0 ? e : splat(A(1))) / (1 + e) - load(t + c));
        });
        break;
      case TokenLoss::cosine: {
        AngleAcross<A> angle(y, t, classes);
        Vec<A> level = angle.norms < A(1e-8) ? zero : angle.yt / angle.norms;
        Vec<A> along_y = level == 0 ? zero : g * level / angle.yy, along_t = level == 0 ? zero : g * level / angle.tt;
        Vec<A> scale = -g / angle.divisor();
        each([&](int c, Vec<A> z) TF_LAMBDA {
          add_to_target(c, scale * z + along_t * load(t + c));
          return scale * load(t + c) + along_y * z;
        });
        break;
      }
    }
  }
}

template <typename S>
void forward(const Counterfactual& a, int64_t begin, int64_t end, void* memory) {
  using A = acc_t<S>;
  Pieces pieces{memory};
  Working<A> s(a, pieces);
  s.read_bias(a);
  int64_t members = a.members;
  A losses[kMaxExperts + 1];
  bool few = few_classes(a);
  auto write = [&](int64_t index, int64_t b, int64_t n, auto value) TF_LAMBDA {
    ((A*)a.full)[index] = value(0);
    A* without = (A*)a.without + b * members * a.tokens + n;
    for (int64_t k = 0; k < members; ++k) without[k * a.tokens] = value(k + 1);
  };
  Token<A> tokens[32];
  const A* rows[kMostRows + kTileRows];
  for (int64_t next = begin; next < end;) {
    auto skip = [&](int64_t index, int64_t b, int64_t n) TF_LAMBDA {
      write(index, b, n, [](int64_t) TF_LAMBDA { return A(0); });
      if (a.kept)
        for (int64_t c = 0; c < members * a.classes; ++c) ((A*)a.kept)[index * members * a.classes + c] = 0;
    };
    int count = read_tile<S>(a, s, next, end, false, true, false, tokens, rows, skip);
    if (a.kept)
      for (int i = 0; i < count; ++i)
        for (int64_t k = 0; k < members; ++k) {
          const A* from = s.projections + (i * members + k) * s.stride;
          A* to = (A*)a.kept + (tokens[i].index * members + k) * a.classes;
          along<A>(a.classes, [&](int64_t c, auto part, int n) TF_LAMBDA {
            put(to, c, get(from, c, part, n), part, n);
          });
        }
    if (few) {
      for (int i = 0; i < count; i += L<A>) {
        int there = smaller(L<A>, count - i);
        read_across(a, s, tokens + i, there, s.projections + i * members * s.stride);
        logits_across(a, s, there);
        losses_across(a, s);
        for (int lane = 0; lane < there; ++lane) {
          const Token<A>& token = tokens[i + lane];
          write(token.index, token.b, token.n,
                [&](int64_t row) TF_LAMBDA { return s.across.results[row * L<A> + lane]; });
        }
      }
      continue;
    }
    for (int i = 0; i < count; ++i) {
      read_target(a, tokens[i], s.target, 1);
      make_logits(a, s, tokens[i], s.projections + i * members * s.stride);
      token_losses(a, s, tokens[i], losses);
      write(tokens[i].index, tokens[i].b, tokens[i].n, [&](int64_t row) TF_LAMBDA { return losses[row]; });
    }
  }
}

// From the gradients of a token's logits: its projections become their own gradients, dw and db are summed up.
template <typename A>
TF_INLINE void join_gradients(const CounterfactualBackward& a, const Working<A>& s, const Token<A>& token,
                              A* projections) {
  int members = int(a.inputs.members);
  Vec<A> dots[kMaxExperts] = {};
  for (int64_t c = 0; c < s.columns; c += L<A>) {
    Vec<A> rest[kMaxExperts];
    Vec<A> behind = {};
    for (int k = members - 1; k >= 0; --k) {
      rest[k] = behind;
      behind += load(s.logits + (k + 1) * s.stride + c);
    }
    Vec<A> before = load(s.logits + c);
    for (int k = 0; k < members; ++k) {
      Vec<A> others = before + rest[k];
      A* p = projections + k * s.stride + c;
      dots[k] += load(p) * others;
      store(p, token.weights[k] * others);
      before += load(s.logits + (k + 1) * s.stride + c);
    }
    if (a.bias_sums) store(s.bias_sums + c, load(s.bias_sums + c) + before);
  }
  if (a.grad_weights)
    for (int k = 0; k < members; ++k) ((A*)a.grad_weights)[token.index * members + k] = sum(dots[k]);
}

// The gradients of a token's losses, as far as there are any, `apart` elements apart in `out`.
template <typename A>
TF_INLINE void read_grads(const CounterfactualBackward& a, const Token<A>& token, A* out, int64_t apart) {
  const Small &full = a.grad_full, &without = a.grad_without;
  if (full.data) out[0] = at<A>(full, token.b * full.stride[0] + token.n * full.stride[1]);
  if (without.data)
    for (int64_t k = 0; k < a.inputs.members; ++k)
      out[(k + 1) * apart] =
          at<A>(without, token.b * without.stride[0] + k * without.stride[1] + token.n * without.stride[2]);
}

// The same of up to L tokens, one in each lane, with all that leads there.
template <typename A>
__attribute__((noinline)) void backward_across(const CounterfactualBackward& a, const Working<A>& s,
                                               const Token<A>* tokens, int there, const bool* absent, A* projections) {
  const Counterfactual& in = a.inputs;
  const Across<A>& x = s.across;
  int members = int(in.members), classes = int(in.classes), row = classes * L<A>;
  read_across(in, s, tokens, there, projections);
  clear(x.grads, (members + 1) * L<A>);
  for (int i = 0; i < there; ++i) read_grads(a, tokens[i], x.grads + i, L<A>);
  if (a.grad_target) clear(x.grad_target, row);
  logits_across(in, s, there);
  gradients_across(in, s, absent, a.grad_target != nullptr);
  clear(x.results, members * L<A>);
  for (int c = 0; c < row; c += L<A>) {
    const A* g = x.logits + c;
    Vec<A> rest[kMaxExperts], behind = {};
    for (int k = members - 1; k >= 0; --k) {
      rest[k] = behind;
      behind += load(g + (k + 1) * row);
    }
    Vec<A> before = load(g);
    for (int k = 0; k < members; ++k) {
      Vec<A> others = before + rest[k];
      A* p = x.projections + k * row + c;
      store(x.results + k * L<A>, load(x.results + k * L<A>) + load(p) * others);
      store(p, load(x.weights + k * L<A>) * others);
      before += load(g + (k + 1) * row);
    }
    store(x.bias_sums + c, load(x.bias_sums + c) + before);
  }
  for (int i = 0; i < there; ++i) {
    int64_t index = tokens[i].index;
    for (int k = 0; k < members; ++k) {
      const A* from = x.projections + k * row + i;
      A* to = projections + (i * members + k) * s.stride;
      for (int c = 0; c < classes; ++c) to[c] = from[c * L<A>];
      if (a.grad_weights) ((A*)a.grad_weights)[index * members + k] = x.results[k * L<A> + i];
    }
    if (a.grad_target)
      for (int c = 0; c < classes; ++c) ((A*)a.grad_target)[index * classes + c] = x.grad_target[c * L<A> + i];
  }
}

// dF = dP W for those rows of the tile that somebody needs.
template <typename S>
TF_INLINE void write_rows(const CounterfactualBackward& a, const Working<acc_t<S>>& s, const Token<acc_t<S>>* tokens,
                          int count) {
  using A = acc_t<S>;
  const Counterfactual& in = a.inputs;
  const A* from[kMostRows + kTileRows];
  S* to[kMostRows];
  int rows = 0;
  for (int i = 0; i < count; ++i)
    for (int k = 0; k < in.members; ++k)
      if (a.grad_features[k]) {
        to[rows] = (S*)a.grad_features[k] + tokens[i].b * a.grad_stride[0] + tokens[i].n * a.grad_stride[1];
        from[rows++] = s.projections + (i * in.members + k) * s.stride;
      }
  if (rows == 0) return;
  if (in.projected) {
    for (int i = 0; i < rows; ++i)
      along<A>(in.classes, [&](int64_t c, auto part, int n) TF_LAMBDA {
        put(to[i], c, get(from[i], c, part, n), part, n);
      });
    return;
  }
  for (int i = 0; i < kTileRows; ++i) from[rows + i] = from[rows - 1];
  int64_t stride = in_whole_vectors(in.width);
  // A head that fits the second cache is read for each register tile of rows, whose gradients then stay in the first; a
  // larger one for the tile of tokens.
  bool fits = in.classes * stride * int64_t(sizeof(A)) <= kHeadInCache;
  for (int first = 0; first < rows;) {
    int end = fits ? smaller(first + kTileRows, rows) : rows;
    by_tiles<A>(padded<A>(in.width), [&](int64_t d, auto width) TF_LAMBDA {
      const A* head = (const A*)a.head_columns + d / kColumn * kColumn * in.classes + d % kColumn;
      for (int i = first; i < end; i += kTileRows) {
        const A* left[kTileRows];
        for (int r = 0; r < kTileRows; ++r) left[r] = from[i + r];
        product_tile<A, kTileRows>(
            width, in.classes, end - i, false, [&](int r, int64_t c) TF_LAMBDA { return left[r][c]; },
            [&](int64_t c) TF_LAMBDA { return head + c * kColumn; },
            [&](int r) TF_LAMBDA { return s.features + (i - first + r) * stride + d; });
      }
    });
    for (int i = first; i < end; ++i)
      along<A>(in.width, [&](int64_t d, auto part, int n) TF_LAMBDA {
        put(to[i], d, get(s.features + (i - first) * stride, d, part, n), part, n, a.past_caches);
      });
    first = end;
  }
}

// sums += dP^T F, in columns of D. `rows`: the tile's features, in whole vectors.
template <typename A>
__attribute__((noinline)) void add_to_head(const Counterfactual& in, const Working<A>& s, const A* const* rows,
                                           int count, A* sums) {
  by_tiles<A>(padded<A>(in.width), [&](int64_t d, auto width) TF_LAMBDA {
    A* column = sums + d / kColumn * kColumn * in.classes + d % kColumn;
    for (int64_t c = 0; c < in.classes; c += kTileRows)
      product_tile<A, kTileRows>(
          width, count, int(smaller(in.classes - c, int64_t(kTileRows))), true,
          [&](int r, int64_t k) TF_LAMBDA { return s.projections[k * s.stride + c + r]; },
          [&](int64_t k) TF_LAMBDA { return rows[k] + d; },
          [&](int r) TF_LAMBDA { return column + (c + r) * kColumn; });
  });
}

template <typename S>
void backward(const CounterfactualBackward& a, int64_t begin, int64_t end, void* memory) {
  using A = acc_t<S>;
  const Counterfactual& in = a.inputs;
  Pieces pieces{memory};
  Working<A> s(in, pieces);
  s.read_bias(in);
  int64_t members = in.members, classes = in.classes, tokens_in_all = in.batch * in.tokens;
  bool recall = in.kept != nullptr, few = few_classes(in);
  int64_t length = in.projected ? classes : in.width;
  auto skip = [&](int64_t index, int64_t b, int64_t n) TF_LAMBDA {
    int64_t offset = b * a.grad_stride[0] + n * a.grad_stride[1];
    for (int64_t k = 0; k < members; ++k)
      if (a.grad_features[k])
        along<A>(length, [&](int64_t d, auto part, int n) TF_LAMBDA {
          put((S*)a.grad_features[k] + offset, d, Vec<A>{}, part, n, a.past_caches);
        });
    if (a.grad_weights) clear((A*)a.grad_weights + index * members, members);
    if (a.grad_target) clear((A*)a.grad_target + index * classes, classes);
  };
  A grads[kMaxExperts + 1] = {};
  bool absent[kMaxExperts + 1];
  for (int64_t k = 0; k <= members; ++k) absent[k] = !(k ? a.grad_without.data : a.grad_full.data);
  Token<A> tokens[32];
  const A* rows[kMostRows + kTileRows];
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    A* head_sums = cleared<A>(a.head_sums, chunk, classes * in_columns(in.width));
    clear(s.bias_sums, s.stride);
    if (few) clear(s.across.bias_sums, classes * L<A>);
    int64_t stop = smaller((chunk + 1) * a.chunk, tokens_in_all);
    for (int64_t next = chunk * a.chunk; next < stop;) {
      int count = read_tile<S>(in, s, next, stop, recall, !recall || head_sums, head_sums, tokens, rows, skip);
      if (count == 0) continue;
      for (int i = 0; few && i < count; i += L<A>)
        backward_across(a, s, tokens + i, smaller(L<A>, count - i), absent, s.projections + i * members * s.stride);
      for (int i = 0; !few && i < count; ++i) {
        const Token<A>& token = tokens[i];
        A* projections = s.projections + i * members * s.stride;
        read_grads(a, token, grads, 1);
        read_target(in, token, s.target, 1);
        make_logits(in, s, token, projections);
        if (a.grad_target) clear(s.grad_target, s.stride);
        token_gradients(in, s, token, grads, absent, a.grad_target != nullptr);
        join_gradients(a, s, token, projections);
        if (a.grad_target)
          for (int64_t c = 0; c < classes; ++c) ((A*)a.grad_target)[token.index * classes + c] = s.grad_target[c];
      }
      if (head_sums) add_to_head(in, s, rows, count * int(members), head_sums);
      write_rows<S>(a, s, tokens, count);
    }
    for (int64_t c = 0; few && c < classes; ++c) s.bias_sums[c] = sum(load(s.across.bias_sums + c * L<A>));
    if (a.bias_sums)
      for (int64_t c = 0; c < s.stride; ++c) ((A*)a.bias_sums)[chunk * s.stride + c] = s.bias_sums[c];
  }
  fence();
}

}  // namespace

int64_t counterfactual_scratch(const Counterfactual& a) {
  Pieces pieces{};
  by_type(a.type, [&](auto s) { Working<acc_t<decltype(s)>>(a, pieces); });
  return pieces.bytes;
}

void counterfactual(const Counterfactual& a, int64_t begin, int64_t end, void* scratch) {
  by_type(a.type, [&](auto s) { forward<decltype(s)>(a, begin, end, scratch); });
}

void counterfactual_backward(const CounterfactualBackward& a, int64_t begin, int64_t end, void* scratch) {
  by_type(a.inputs.type, [&](auto s) { backward<decltype(s)>(a, begin, end, scratch); });
}

void counterfactual_panel(const CounterfactualPack& a, int64_t begin, int64_t end) {
  a.wide ? panel<double>(a, begin, end) : panel<float>(a, begin, end);
}

void counterfactual_columns(const CounterfactualPack& a, int64_t begin, int64_t end) {
  a.wide ? columns<double, false>(a, begin, end) : columns<float, false>(a, begin, end);
}

void counterfactual_rows(const CounterfactualPack& a, int64_t begin, int64_t end) {
  a.wide ? columns<double, true>(a, begin, end) : columns<float, true>(a, begin, end);
}

}  // namespace TIGER_FAST_ISA
}  // namespace tiger_fast
