import java.io.RandomAccessFile;
import java.nio.ByteBuffer;
import java.nio.MappedByteBuffer;
import java.nio.channels.FileChannel;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.ForkJoinPool;
import java.util.concurrent.Future;
import java.util.stream.LongStream;
import java.util.zip.CRC32;
import java.util.zip.Deflater;
import java.util.zip.Inflater;

/** What a virtual machine does with memory: many threads, collections, memory off the heap, files, deep stacks. */
public class Workers {
  static long garbage(int seed) {
    Map<Integer, String> map = new HashMap<>();
    long sum = 0;
    for (int i = 0; i < 3000; i++) {
      map.put((i * 31 + seed) % 997, "value " + i);
      sum += map.size();
      byte[] lost = new byte[i % 4096];
      sum += lost.length;
    }
    return sum;
  }

  static long offHeap(int seed) throws Exception {
    ByteBuffer input = ByteBuffer.allocateDirect(64 << 10);
    while (input.remaining() >= 8) input.putLong((long) seed * input.position() % 1001);
    input.flip();
    Deflater deflater = new Deflater();
    deflater.setInput(input);
    deflater.finish();
    ByteBuffer packed = ByteBuffer.allocateDirect(128 << 10);
    deflater.deflate(packed);
    deflater.end();
    packed.flip();
    Inflater inflater = new Inflater();
    inflater.setInput(packed);
    ByteBuffer output = ByteBuffer.allocateDirect(64 << 10);
    inflater.inflate(output);
    inflater.end();
    output.flip();
    CRC32 crc = new CRC32();
    crc.update(output);
    return crc.getValue();
  }

  static int depth(int left) {
    return left == 0 ? 0 : 1 + depth(left - 1);
  }

  static boolean overflows() {
    try {
      depth(Integer.MAX_VALUE);
      return false;
    } catch (StackOverflowError expected) {
      return true;
    }
  }

  static long mapped(String name, int size) throws Exception {
    try (RandomAccessFile file = new RandomAccessFile(name, "rw")) {
      MappedByteBuffer buffer = file.getChannel().map(FileChannel.MapMode.READ_WRITE, 0, size);
      for (int i = 0; i < size; i += 512) buffer.putInt(i, i);
      buffer.force();
      long sum = 0;
      for (int i = 0; i < size; i += 512) sum += buffer.getInt(i);
      return sum;
    }
  }

  public static void main(String[] arguments) throws Exception {
    int threads = Integer.parseInt(arguments[0]);
    ExecutorService pool = Executors.newFixedThreadPool(threads);
    List<Future<Long>> results = new ArrayList<>();
    for (int i = 0; i < threads * 3; i++) {
      int seed = i;
      results.add(pool.submit(() -> garbage(seed) + (seed % 4 == 0 ? offHeap(seed) : 0)));
    }
    long total = 0;
    for (Future<Long> result : results) total += result.get();
    pool.shutdown();
    System.out.println("pool " + total);

    // Threads that come and go, with stacks of their own sizes; each overflows its own.
    int count = threads * 2;
    CountDownLatch done = new CountDownLatch(count);
    Map<Integer, Boolean> overflowed = new ConcurrentHashMap<>();
    for (int i = 0; i < count; i++) {
      int number = i;
      Runnable body = () -> {
        if (number % 8 == 0) overflowed.put(number, overflows());
        else if (depth(500) != 500) throw new AssertionError();
        done.countDown();
      };
      new Thread(null, body, "short-lived " + i, (256L + number % 5 * 256) << 10).start();
    }
    done.await();
    System.out.println("threads " + overflowed.size() + " " + !overflowed.containsValue(false));

    long parallel = new ForkJoinPool(8).submit(() -> LongStream.range(0, 300_000).parallel().map(i -> i * i % 77).sum()).get();
    System.out.println("parallel " + parallel);
    System.out.println("mapped " + mapped("mapped.bin", 8 << 20));
    try {
      long[][] all = new long[4096][];
      for (int i = 0; i < all.length; i++) all[i] = new long[1 << 18];
      System.out.println("no limit");
    } catch (OutOfMemoryError expected) {
      System.out.println("out of memory, as it should be");
    }
    System.gc();
    System.out.println("alive " + (garbage(1) != 0));
  }
}
