// Random numbers of torch's CPU generator, so that a seed draws the same image here as in Python.
// The generator is the Mersenne Twister mt19937 (Matsumoto and Nishimura, 1998).

const WORDS = 624, SHIFT = 397;
const BLOCK = 16; // torch computes normal numbers in blocks of this many

export class Noise {
  /** @param {number} seed a whole number within 0 … 2³² − 1 */
  constructor(seed) {
    this.state = new Uint32Array(WORDS);
    this.state[0] = seed;
    for (let i = 1; i < WORDS; i++) {
      const last = this.state[i - 1] ^ (this.state[i - 1] >>> 30);
      this.state[i] = Math.imul(1812433253, last) + i;
    }
    this.next = WORDS;
    this.kept = null; // second number of a pair, see single()
  }

  /** Return 32 random bits. */
  bits() {
    if (this.next === WORDS) this.twist();
    let y = this.state[this.next++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  }

  twist() {
    const s = this.state;
    for (let i = 0; i < WORDS; i++) {
      const y = (s[i] & 0x80000000) | (s[(i + 1) % WORDS] & 0x7fffffff);
      s[i] = s[(i + SHIFT) % WORDS] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
    }
    this.next = 0;
  }

  /** Return a permutation of 0 … count − 1, as torch.randperm. */
  permutation(count) {
    const order = Array.from({ length: count }, (_, index) => index);
    for (let i = 0; i < count - 1; i++) {
      const j = i + this.bits() % (count - i);
      [order[i], order[j]] = [order[j], order[i]];
    }
    return order;
  }

  /** Return `count` standard normal numbers, as torch.randn. */
  normals(count) {
    const values = new Float32Array(count);
    if (count < BLOCK) return values.map(() => this.single());
    for (let i = 0; i < count; i++) values[i] = this.uniform();
    for (let start = 0; start + BLOCK <= count; start += BLOCK) normalBlock(values.subarray(start, start + BLOCK));
    if (count % BLOCK) { // the last block begins earlier, with new numbers
      const last = values.subarray(count - BLOCK);
      for (let i = 0; i < BLOCK; i++) last[i] = this.uniform();
      normalBlock(last);
    }
    return values;
  }

  /** Return a number in [0, 1) with 24 random bits. */
  uniform() {
    return (this.bits() & 0xffffff) / 0x1000000;
  }

  /** Return a number in [0, 1) with 53 random bits. */
  uniform53() {
    const high = this.bits() & 0x1fffff;
    return (high * 0x100000000 + this.bits()) / 2 ** 53;
  }

  /** Return one normal number. They are made in pairs. */
  single() {
    if (this.kept !== null) {
      const value = this.kept;
      this.kept = null;
      return value;
    }
    const angle = 2 * Math.PI * this.uniform53();
    const radius = Math.sqrt(-2 * Math.log1p(-this.uniform53()));
    this.kept = radius * Math.sin(angle);
    return radius * Math.cos(angle);
  }
}

/** Turn 16 uniform numbers into normal ones, in place (Box and Muller, 1958). */
function normalBlock(values) {
  for (let i = 0; i < BLOCK / 2; i++) {
    const radius = Math.sqrt(-2 * Math.log(1 - values[i]));
    const angle = 2 * Math.PI * values[i + BLOCK / 2];
    values[i] = radius * Math.cos(angle);
    values[i + BLOCK / 2] = radius * Math.sin(angle);
  }
}
